"""Every kernel of the CUDA backend, checked and timed on the card at hand, beside the peers: python -m bench.gpu"""
