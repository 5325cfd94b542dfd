#define SBD_ISA avx2_vnni
#include "backend/cpu/vec_avx2.h"

#include "backend/cpu/kernels_inl.h"
