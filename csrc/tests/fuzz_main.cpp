// Drives fuzz.cpp where there is no libFuzzer: random bytes, or the inputs that are named.
//
//   fuzz [runs [seed]]    runs from a seeded generator; the run that fails is told
//   fuzz FILE...          inputs kept by libFuzzer, one after the other
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

long run = 0, seed = 1;

void where() {
    char text[80];
    const int size = std::snprintf(text, sizeof text, "fuzz: in run %ld of seed %ld\n", run, seed);
    if (write(2, text, static_cast<size_t>(size)) < 0) std::_Exit(2);
}

void tell(int signal) {  // abort or a touched guard page: say where, then die as if nobody had listened
    where();
    std::signal(signal, SIG_DFL);
    std::raise(signal);
}

void listen() {
    std::signal(SIGABRT, tell);
    if (__sanitizer_set_death_callback != nullptr) {  // its own handlers say more
        __sanitizer_set_death_callback(where);
        return;
    }
    for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, tell);
}

void random_bytes(long runs) {
    std::mt19937_64 random;
    std::vector<uint8_t> bytes;
    for (run = 0; run < runs; ++run) {
        random.seed(static_cast<uint64_t>(seed) << 40 ^ static_cast<uint64_t>(run));  // each run can be had alone
        bytes.resize(24 + random() % 200);
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
}

void file(const char* name) {
    std::ifstream stream(name, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(stream), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
    listen();
    char* rest = nullptr;
    const long runs = argc > 1 ? std::strtol(argv[1], &rest, 10) : 1000;
    if (argc > 1 && *rest != '\0') {
        for (run = 1; run < argc; ++run) file(argv[run]);
        std::printf("%d inputs, all well\n", argc - 1);
        return 0;
    }
    if (argc > 2) seed = std::atol(argv[2]);
    random_bytes(runs);
    std::printf("%ld runs, all well\n", runs);
    return 0;
}
