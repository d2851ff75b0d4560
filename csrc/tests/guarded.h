// What the test binaries share: memory that notices an access out of bounds, and loops to lend to a kernel.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "parallel.h"

namespace qexp {

template <class T>
class Guarded {  // count elements that end (or begin) at an inaccessible page
   public:
    explicit Guarded(size_t count, bool at_end = true) : count_(count) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
        inner_ = (bytes + page - 1) / page * page;
        total_ = inner_ + 2 * page;
        base_ = static_cast<char*>(mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED) std::exit(2);
        if (inner_ != 0 && mprotect(base_ + page, inner_, PROT_READ | PROT_WRITE) != 0) std::exit(2);
        data_ = reinterpret_cast<T*>(base_ + page + (at_end ? inner_ - bytes : 0));
        if (inner_ != 0) std::memset(static_cast<void*>(base_ + page), 0x7F, inner_);
    }
    ~Guarded() { munmap(base_, total_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    T* get() const { return data_; }
    size_t size() const { return count_; }
    T& operator[](size_t i) const { return data_[i]; }

   private:
    size_t count_, inner_, total_;
    char* base_;
    T* data_;
};

inline void serial(int64_t count, int64_t, Task task, void* context) {
    if (count > 0) task(context, 0, count);
}

inline void one_by_one(int64_t count, int64_t grain, Task task, void* context) {  // the finest split that is allowed
    for (int64_t i = 0; i < count; i += grain) task(context, i, std::min(count, i + grain));
}

inline void threads(int64_t count, int64_t, Task task, void* context) {
    std::vector<std::thread> crew;
    for (int64_t i = 0; i < 3; ++i) crew.emplace_back(task, context, count * i / 3, count * (i + 1) / 3);
    for (auto& one : crew) one.join();
}

}  // namespace qexp
