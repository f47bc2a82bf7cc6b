# The CUDA library without a GPU; flags are in setup.py. Everything else is in CONTRIBUTING.md.
PYTHON ?= python
ARCH ?= 9.0
export FORCE_CUDA = 1

.PHONY: cuda cuda-all cuda-resources

cuda: # for one architecture
	TORCH_CUDA_ARCH_LIST="$(ARCH)" $(PYTHON) setup.py build_ext --inplace

cuda-all: # for every architecture that setup.py lists
	rm -f build/objects/csrc/cuda/*.o
	env -u TORCH_CUDA_ARCH_LIST $(PYTHON) setup.py build_ext --inplace

cuda-resources: # registers and memory of every kernel; fails if one spills
	rm -f build/objects/csrc/cuda/*.o
	TORCH_CUDA_ARCH_LIST="$(ARCH)" NVCC_APPEND_FLAGS="-Xptxas -v" \
	  $(PYTHON) setup.py build_ext --inplace 2>&1 | $(PYTHON) tools/cuda_resources.py
