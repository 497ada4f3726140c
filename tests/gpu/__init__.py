"""Tests of the GPU kernels; `cases` holds the problems, which the interpreter's tests on a CPU share."""
