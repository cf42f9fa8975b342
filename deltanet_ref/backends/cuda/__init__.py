"""The operators on a CUDA card, under the names of deltanet_ref.ops."""
