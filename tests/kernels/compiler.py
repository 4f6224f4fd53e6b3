"""Whether this machine has a C++ compiler, without which there are no native kernels to test."""

import pytest

from ultramem_megatron.kernels.native.library import native_library

needs_compiler = pytest.mark.skipif(native_library() is None, reason="no C++ compiler here")
NATIVE = pytest.param("native", marks=needs_compiler)
