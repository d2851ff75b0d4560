// All torch bindings in one translation unit: reading torch's headers takes most of the time that compiling them takes.
#include "binding_codes.cpp"
#include "binding_gemm.cpp"
#include "binding_gram.cpp"
#include "binding_hadamard.cpp"
#include "binding_int4.cpp"
#include "binding_sweep.cpp"
