#define SBD_ISA avx2_vnni
#define SBD_BASE avx2
#define SBD_OWN bytes
#include "backend/cpu/vec_avx2.h"

#include "backend/cpu/kernels_inl.h"
