#define SBD_ISA avx512_bf16
#define SBD_BASE avx512
#define SBD_OWN bf16
#include "backend/cpu/vec_avx512.h"

#include "backend/cpu/kernels_inl.h"
