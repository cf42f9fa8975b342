"""CUDA kernels on a CPU: unchanged .cu sources, compiled by g++ and checked while they run.

build   compile and launch
jobs    record launches, run them under sanitizers, switch off barriers

This folder needs nothing of the package around it: docs/cuda-on-cpu.md.
"""
