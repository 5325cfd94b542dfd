#define SBD_ISA avx512
#include "backend/cpu/vec_avx512.h"

#include "backend/cpu/kernels_inl.h"
