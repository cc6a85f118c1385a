// A team of threads that run the same function together, with barriers.
//
// Between the operations of a plan a thread waits for microseconds, so it spins. Between runs it spins for a moment,
// then sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace sparing {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

class Team {
  public:
    explicit Team(int threads) : size_(threads) {
        for (int id = 1; id < threads; id++) workers_.emplace_back([this, id] { serve(id); });
    }

    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            quit_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    int size() const { return size_; }

    // Call task(id) for id = 0 (in the calling thread), 1, ..., size - 1. Returns when all have returned.
    void run(const std::function<void(int)>& task) {
        if (size_ > 1) {
            {
                std::lock_guard<std::mutex> lock(mutex_);
                task_ = &task;
                run_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        task(0);
        barrier();
    }

    // Wait until all threads of the team are here.
    void barrier() {
        if (size_ == 1) return;
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        // Another process may have the processor that the others need.
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
            spins < 2000 ? pause() : std::this_thread::yield();
    }

  private:
    void serve(int id) {
        for (int seen = 0;; seen++) {
            for (int spins = 0; spins < 20000 && run_.load(std::memory_order_acquire) == seen; spins++) pause();
            const std::function<void(int)>* task;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return quit_ || run_.load(std::memory_order_acquire) != seen; });
                if (quit_) return;
                task = task_;
            }
            (*task)(id);
            barrier();
        }
    }

    const int size_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* task_ = nullptr;
    bool quit_ = false;
    std::atomic<int> run_{0}, arrived_{0}, phase_{0};
};

}  // namespace sparing
