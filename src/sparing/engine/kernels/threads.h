// A team of threads that work on the same task.
//
// The calling thread does not wait for the others to begin: on a busy machine they may come late, or not at all. So a
// task must be right whichever threads take part. Threads spin for a moment after a run, then sleep.
//
// Where PyTorch runs between two tasks, the team is that of OpenMP: the threads that PyTorch has used spin for
// milliseconds, and would take the processors from other threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "engine.h"

namespace sparing {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// Wait for a condition that another thread makes true within microseconds, unless it has lost its processor.
template <class Condition>
void spin_until(Condition condition) {
    for (int spins = 0; !condition(); spins++) spins < 2000 ? pause() : std::this_thread::yield();
}

// The processor of the calling thread, or -1 if the system does not tell.
inline int processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// Move the calling thread to another processor than `taken`. A thread that wakes up often lands on the processor of the
// one that woke it, and they take turns there until the system notices, which can take seconds.
inline void leave(int taken) {
#if defined(__linux__)
    cpu_set_t allowed, others;
    if (taken < 0 || sched_getcpu() != taken || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
    others = allowed;
    CPU_CLR(taken, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
    sched_setaffinity(0, sizeof(allowed), &allowed);
#else
    (void)taken;
#endif
}

class Team {
  public:
    Team(int threads, const SparingOpenmp* openmp) : size_(threads), openmp_(openmp ? *openmp : SparingOpenmp{}) {
        if (openmp) return;
        try {
            for (int id = 1; id < threads; id++) workers_.emplace_back([this, id] { serve(id); });
        } catch (...) {  // the system refuses more threads
            quit();
            throw;
        }
    }

    ~Team() { quit(); }

    int size() const { return size_; }

    // Call task(0) in the calling thread, and task(id) in those of the others that come in time. Returns when all calls
    // have returned.
    void run(const std::function<void(int)>& task) {
        if (size_ == 1) return task(0);
        if (openmp_.parallel) {
            const std::pair<const std::function<void(int)>*, int (*)()> argument{&task, openmp_.thread};
            const auto call = [](void* data) {
                const auto& [function, thread] = *static_cast<decltype(argument)*>(data);
                (*function)(thread());
            };
            return openmp_.parallel(call, const_cast<void*>(static_cast<const void*>(&argument)), size_, 0);
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            processor_ = processor();
            runs_++;
        }
        wake_.notify_all();
        task(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = nullptr;
        }
        spin_until([this] { return active_.load(std::memory_order_acquire) == 0; });
    }

  private:
    void quit() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            quit_ = true;
            runs_++;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    void serve(int id) {
        for (int64_t seen = 0;;) {
            for (int spins = 0; spins < 10000 && runs_.load(std::memory_order_relaxed) == seen; spins++) pause();
            const std::function<void(int)>* task;
            int taken;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return runs_.load(std::memory_order_relaxed) != seen; });
                seen = runs_.load(std::memory_order_relaxed);
                if (quit_) return;
                task = task_;
                taken = processor_;
                if (task) active_.fetch_add(1, std::memory_order_relaxed);
            }
            leave(taken);
            if (task == nullptr) continue;  // too late
            (*task)(id);
            active_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int size_;
    const SparingOpenmp openmp_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* task_ = nullptr;
    int processor_ = -1;  // of the thread that called run
    bool quit_ = false;
    std::atomic<int64_t> runs_{0};
    std::atomic<int> active_{0};
};

}  // namespace sparing
