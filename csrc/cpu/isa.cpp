#include "../isa.h"

#include <atomic>
#include <stdexcept>

namespace seme {

Isa best_isa() {
#if defined(__x86_64__)
    static const Isa best = [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("x86-64-v4")) return Isa::Avx512;
        if (__builtin_cpu_supports("x86-64-v3")) return Isa::Avx2;
        return Isa::Baseline;
    }();
    return best;
#else
    return Isa::Baseline;
#endif
}

static std::atomic<int> chosen{-1};

Isa isa() {
    int c = chosen.load(std::memory_order_relaxed);
    return c < 0 ? best_isa() : Isa(c);
}

void set_isa(Isa i) {
    if (i > best_isa()) throw std::invalid_argument("this machine does not have the instruction set asked for");
    chosen = int(i);
}

}  // namespace seme
