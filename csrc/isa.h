// One source, several instruction sets: a kernel body is inlined into functions compiled for plain x86-64
// (baseline), -v3 (AVX2) and -v4 (AVX-512), and the best one the machine has is called. No flag applies to
// the whole library, so it loads and runs on any x86-64; on other architectures there is only the baseline.
//
// A body is a struct with a static SEME_INLINE `run`; everything it calls must be SEME_INLINE as well,
// or that part stays baseline code.
#pragma once

#define SEME_INLINE inline __attribute__((always_inline))

namespace seme {

enum class Isa : int { Baseline = 0, Avx2 = 1, Avx512 = 2 };

Isa best_isa();       // what this machine can run
Isa isa();            // what is in use: best_isa(), unless set_isa() lowered it
void set_isa(Isa i);  // for tests; throws std::invalid_argument beyond best_isa()

#if defined(__x86_64__)
template <class Body, class... A>
__attribute__((target("arch=x86-64-v3"))) void run_avx2(A... args) {
    Body::run(args...);
}
template <class Body, class... A>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void run_avx512(A... args) {
    Body::run(args...);
}
#endif

template <class Body, class... A>
void run_best(A... args) {
#if defined(__x86_64__)
    if (isa() == Isa::Avx512) return run_avx512<Body, A...>(args...);
    if (isa() == Isa::Avx2) return run_avx2<Body, A...>(args...);
#endif
    Body::run(args...);
}

}  // namespace seme
