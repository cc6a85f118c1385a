// A plan: tensors, and operations in the order in which they run.
#pragma once

#include <chrono>
#include <map>
#include <set>

#include "attention.h"
#include "bands.h"
#include "convolution.h"
#include "memory.h"
#include "pointwise.h"
#include "row.h"
#include "threads.h"
#include "transfer.h"
#include "window.h"

namespace sparing {

// Treat denormal numbers as zero while it lives: arithmetic on them takes a hundred times as long.
class NoDenormals {
  public:
#if defined(__SSE__)
    NoDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
    ~NoDenormals() { __builtin_ia32_ldmxcsr(before_); }

  private:
    unsigned before_;
#endif
};

class Plan {
  public:
    Plan(int threads, const SparingOpenmp* openmp) : team_(threads, openmp) {}

    int add_tensor(const Layout& layout) {
        require(open_, "the plan is finished");
        tensors_.push_back({layout, nullptr});
        written_.push_back(false);
        return static_cast<int>(tensors_.size()) - 1;
    }

    const Layout& layout(int number) const {
        require(
            number >= 0 && number < static_cast<int>(tensors_.size()), "there is no tensor " + std::to_string(number)
        );
        return tensors_[number].layout;
    }

    // `parts`: other operations write other channels of the same tensor.
    void add(std::unique_ptr<Operation> operation, bool parts = false) {
        require(open_, "the plan is finished");
        for (const int number : operation->reads) {
            layout(number);
            require(written_[number], "tensor " + std::to_string(number) + " is read before it is written");
        }
        for (const int number : operation->writes) {
            layout(number);
            require(parts || !written_[number], "tensor " + std::to_string(number) + " is written twice");
            for (const int other : operation->reads) require(other != number, "an operation cannot write its input");
            written_[number] = true;
        }
        operations_.push_back(std::move(operation));
    }

    void add_input(std::unique_ptr<Input> input) {
        Input* const added = input.get();
        add(std::move(input));  // may throw
        inputs_.push_back(added);
    }

    void add_output(std::unique_ptr<Output> output) {
        Output* const added = output.get();
        add(std::move(output));
        outputs_.push_back(added);
    }

    void finish() {
        require(open_, "the plan is finished");
        require(!inputs_.empty() && !outputs_.empty(), "a plan needs an input and an output");
        open_ = false;  // even if it fails: operations are prepared once
        choose_layouts();
        join_bands();
        int64_t scratch = 0;
        for (auto& operation : operations_) {
            operation->prepare(tensors_, team_.size());
            scratch = std::max(scratch, operation->scratch());
        }
        std::tie(memory_, floats_) = place(tensors_, operations_);
        for (int thread = 0; thread < team_.size(); thread++) scratch_.push_back(allocate(scratch + GUARD));
        next_ = std::vector<std::atomic<int64_t>>(operations_.size() * team_.size());
        done_ = std::vector<std::atomic<int64_t>>(operations_.size());
        seconds_.assign(operations_.size(), 0.0);
        finished_ = true;
    }

    int64_t bytes() const {
        require(finished_, "the plan is not finished");
        return floats_ * static_cast<int64_t>(sizeof(float));
    }

    void run(const float* const* inputs, float* const* outputs) {
        require(finished_, "the plan is not finished");
        for (size_t index = 0; index < inputs_.size(); index++) inputs_[index]->data = inputs[index];
        for (size_t index = 0; index < outputs_.size(); index++) outputs_[index]->data = outputs[index];
        for (auto* counters : {&next_, &done_})
            for (auto& counter : *counters) counter.store(0, std::memory_order_relaxed);
        team_.run([this](int thread) { work(thread); });
    }

    bool profile = false;
    const std::vector<std::unique_ptr<Operation>>& operations() const { return operations_; }
    double seconds(size_t index) const {
        require(finished_, "the plan is not finished");
        return seconds_[index];
    }

  private:
    void work(int thread) {
        const NoDenormals guard;
        auto before = std::chrono::steady_clock::now();
        const int threads = team_.size();
        for (size_t index = 0; index < operations_.size(); index++) {
            Operation& operation = *operations_[index];
            const int64_t items = operation.items();
            // A thread begins with its own part, which it often wrote before, and then helps the others.
            int64_t count = 0;
            for (int step = 0; step < threads; step++) {
                const int owner = (thread + step) % threads;
                const int64_t begin = items * owner / threads, end = items * (owner + 1) / threads;
                std::atomic<int64_t>& next = next_[index * threads + owner];
                for (int64_t item; (item = begin + next.fetch_add(1, std::memory_order_relaxed)) < end; count++)
                    operation.run(item, tensors_, scratch_[thread].get());
            }
            std::atomic<int64_t>& done = done_[index];
            done.fetch_add(count, std::memory_order_acq_rel);
            spin_until([&] { return done.load(std::memory_order_acquire) == items; });
            if (profile && thread == 0) {
                const auto now = std::chrono::steady_clock::now();
                seconds_[index] = std::chrono::duration<double>(now - before).count();
                before = now;
            }
        }
    }

    // Tensors of equal height and width get the same pitch and tiles. A pitch beyond the width saves copies (gather.h),
    // or begins rows at half a cache line, but its unused lanes are computed, too.
    void choose_layouts() {
        std::map<std::pair<int64_t, int64_t>, std::vector<int>> sizes;
        for (size_t number = 0; number < tensors_.size(); number++) {
            Layout& layout = tensors_[number].layout;
            set_pitch(layout, layout.width);
            sizes[{layout.height, layout.width}].push_back(static_cast<int>(number));
        }
        for (const auto& [size, numbers] : sizes) {
            std::vector<Operation*> writers;
            std::set<int64_t> pitches{size.second};
            for (const auto& operation : operations_) {
                if (operation->window() == nullptr) continue;
                if (std::find(numbers.begin(), numbers.end(), operation->writes[0]) == numbers.end()) continue;
                writers.push_back(operation.get());
                const int64_t shared = pitch_for(*operation->window(), layout(operation->reads[0]).width, size.second);
                if (shared > 2 * size.second + LANES) continue;  // most lanes would be unused
                pitches.insert({shared, (shared + 7) / 8 * 8});
            }
            int64_t best = size.second;
            double least = INFINITY;
            for (const int64_t pitch : pitches) {
                double cost = 0;
                for (Operation* operation : writers) {
                    Layout out = layout(operation->writes[0]);
                    set_pitch(out, pitch);
                    cost += operation->cost(layout(operation->reads[0]), out);
                }
                if (cost < least) {
                    least = cost;
                    best = pitch;
                }
            }
            for (const int number : numbers) set_pitch(tensors_[number].layout, best);
        }
    }

    // Join each convolution with the operation on a window that alone reads its output, where this saves time.
    void join_bands() {
        for (size_t index = 0; index < operations_.size(); index++) {
            auto* convolution = dynamic_cast<Convolution*>(operations_[index].get());
            if (!convolution) continue;
            std::vector<size_t> readers;
            for (size_t other = index + 1; other < operations_.size(); other++) {
                const std::vector<int>& read = operations_[other]->reads;
                if (std::find(read.begin(), read.end(), convolution->writes[0]) != read.end()) readers.push_back(other);
            }
            if (readers.size() != 1) continue;
            std::unique_ptr<Operation>& reader = operations_[readers[0]];
            auto* window = dynamic_cast<WindowOperation*>(reader.get());
            if (!window) continue;
            window->least_bands = Bands::count(*convolution, *window, tensors_, team_.size());
            if (window->least_bands > 1) reader = std::make_unique<Bands>(std::move(operations_[index]), std::move(reader));
        }
        operations_.erase(std::remove(operations_.begin(), operations_.end(), nullptr), operations_.end());
    }

    static void set_pitch(Layout& layout, int64_t pitch) {
        layout.pitch = pitch;
        const int64_t total = layout.total_vectors(), tiles = (total + MOST - 1) / MOST;
        layout.vectors = (total + tiles - 1) / tiles;
    }

    Team team_;
    bool open_ = true, finished_ = false;
    std::vector<Tensor> tensors_;
    std::vector<bool> written_;
    std::vector<std::unique_ptr<Operation>> operations_;
    std::vector<Input*> inputs_;
    std::vector<Output*> outputs_;
    Memory memory_;
    int64_t floats_ = 0;
    std::vector<Memory> scratch_;  // of each thread
    std::vector<std::atomic<int64_t>> next_;  // item of each part of each operation
    std::vector<std::atomic<int64_t>> done_;  // items of each operation
    std::vector<double> seconds_;
};

}  // namespace sparing
