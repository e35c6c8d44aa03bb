// Threads that work on one kernel call, and the memory they share from call to call.
//
// OpenMP in the release build, so that kvote and torch use one pool of threads. ThreadSanitizer cannot see into the
// OpenMP runtime, so KVOTE_STD_THREADS builds the same kernels on plain threads.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#ifdef KVOTE_STD_THREADS
#include <pthread.h>

#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) ((void)0)
#endif

namespace KVOTE_ISA {

struct Team {
    int rank, size;
#ifdef KVOTE_STD_THREADS
    pthread_barrier_t* gate = nullptr;
    void barrier() const {
        if (size > 1) pthread_barrier_wait(gate);
    }
#else
    void barrier() const {
        if (size == 1) return;
#pragma omp barrier
    }
#endif
    // This thread's share of 0 .. n - 1: [from(n), to(n)).
    std::int64_t from(std::int64_t n) const { return n * rank / size; }
    std::int64_t to(std::int64_t n) const { return n * (rank + 1) / size; }
};

template <class Body>
inline void parallel(int threads, Body&& body) {
    if (threads <= 1) {
        body(Team{0, 1});
        return;
    }
#ifdef KVOTE_STD_THREADS
    pthread_barrier_t gate;
    pthread_barrier_init(&gate, nullptr, unsigned(threads));
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back([&, i] { body(Team{i, threads, &gate}); });
    body(Team{0, threads, &gate});
    for (auto& other : others) other.join();
    pthread_barrier_destroy(&gate);
#else
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
#endif
}

// Memory that a thread keeps between calls: a step of a long context must not wait for fresh pages every time.
// Contents are undefined; what is beyond KEPT bytes goes back when the call ends.
class Workspace {
   public:
    static constexpr std::size_t HUGE = std::size_t(1) << 21, KEPT = std::size_t(1) << 28;

    explicit Workspace(std::size_t bytes) {
        bytes += ALIGN;
        if (bytes > kept().size) {
            kept().release();
            std::size_t rounded = bytes > HUGE ? (bytes + HUGE - 1) / HUGE * HUGE : (bytes + 4095) / 4096 * 4096;
            void* memory = std::aligned_alloc(bytes > HUGE ? HUGE : 4096, rounded);
            if (!memory) throw std::bad_alloc();
            if (bytes > HUGE) madvise(memory, rounded, MADV_HUGEPAGE);
            kept().memory = memory, kept().size = rounded;
        }
        next_ = static_cast<char*>(kept().memory);
        ASAN_POISON_MEMORY_REGION(kept().memory, kept().size);
    }
    ~Workspace() {
        if (kept().size > KEPT) kept().release();
    }
    Workspace(const Workspace&) = delete;

    // Room for `count` of T; the sum of all, each rounded up to ALIGN, must fit what was asked for.
    template <class T>
    T* take(std::int64_t count) {
        static_assert(std::is_trivially_default_constructible<T>::value, "contents are undefined");
        T* mine = reinterpret_cast<T*>(next_);
        next_ += bytes<T>(count);
        ASAN_UNPOISON_MEMORY_REGION(mine, std::size_t(count) * sizeof(T));
        return mine;
    }
    template <class T>
    static std::size_t bytes(std::int64_t count) {
        return count ? (std::size_t(count) * sizeof(T) + ALIGN - 1) / ALIGN * ALIGN + GAP : 0;
    }

   private:
    static constexpr std::size_t ALIGN = 64;
#ifdef __SANITIZE_ADDRESS__
    static constexpr std::size_t GAP = ALIGN;  // forbidden, so that a step beyond one's room is seen
#else
    static constexpr std::size_t GAP = 0;
#endif
    struct Kept {
        void* memory = nullptr;
        std::size_t size = 0;
        void release() {
            ASAN_UNPOISON_MEMORY_REGION(memory, size);
            std::free(memory);
            memory = nullptr, size = 0;
        }
        ~Kept() { release(); }
    };
    static Kept& kept() {
        static thread_local Kept mine;
        return mine;
    }
    char* next_;
};

}  // namespace KVOTE_ISA
