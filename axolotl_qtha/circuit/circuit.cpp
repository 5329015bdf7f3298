// The circuit of `ansatz.py` on a CPU: one token per SIMD lane, a block of tokens in the first-level cache.
//
// The circuit comes as alternating walls (RY on every qubit) and diagonals (a CRZ ring), see `torch_engine.py`. Only RY angles of
// encoding walls differ between tokens; by the addition formulas they need cos and sin of z / 2, which are passed in.
//
// Plain C interface, called through ctypes. Sums over tokens are made per chunk of tokens, in an order that does not depend on the
// number of threads.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kBytes = 64;  // of a vector: one AVX-512 register, or what the compiler makes of it
constexpr int kMaxQubits = 12;

template <typename T> struct Lanes;
template <> struct Lanes<float> { typedef float type __attribute__((vector_size(kBytes))); };
template <> struct Lanes<double> { typedef double type __attribute__((vector_size(kBytes))); };

template <typename T> struct Circuit {
    int64_t tokens;
    int qubits, walls;
    const T *cos_z, *sin_z;          // (tokens, qubits), of z / 2
    const uint8_t *encodes;          // (walls): whether z is added to the wall's angles
    const T *cos_wall, *sin_wall;    // (walls, qubits), of half the angle all tokens share
    const T *cos_diag, *sin_diag;    // (walls - 1, 2**qubits)
};

template <typename T> class Block {
    using V = typename Lanes<T>::type;
    static constexpr int kLanes = kBytes / sizeof(T);

  public:
    explicit Block(const Circuit<T> &c, bool adjoint)
        : c_(c), size_(int64_t(1) << c.qubits), memory_(nullptr) {
        const size_t count = size_ * (adjoint ? 4 : 2);
        memory_ = static_cast<V *>(std::aligned_alloc(kBytes, count * sizeof(V)));
        re_ = memory_;
        im_ = re_ + size_;
        lre_ = adjoint ? im_ + size_ : nullptr;
        lim_ = adjoint ? lre_ + size_ : nullptr;
    }
    ~Block() { std::free(memory_); }
    Block(const Block &) = delete;
    Block &operator=(const Block &) = delete;

    static constexpr int lanes() { return kLanes; }

    void load(int64_t first) {
        first_ = first;
        count_ = c_.tokens - first < kLanes ? int(c_.tokens - first) : kLanes;
        for (int q = 0; q < c_.qubits; ++q) {
            cz_[q] = V{} + T(1);
            sz_[q] = V{};
            for (int l = 0; l < count_; ++l) {
                cz_[q][l] = c_.cos_z[(first + l) * c_.qubits + q];
                sz_[q][l] = c_.sin_z[(first + l) * c_.qubits + q];
            }
        }
    }

    void forward() {
        V cos, sin;
        re_[0] = V{} + T(1);
        for (int q = c_.qubits - 1, filled = 1; q >= 0; --q, filled *= 2) {  // RYs on |0>: a real product state
            angle(0, q, cos, sin);
            for (int s = 0; s < filled; ++s) {
                re_[s + filled] = re_[s] * sin;
                re_[s] *= cos;
            }
        }
        std::memset(static_cast<void *>(im_), 0, size_ * sizeof(V));
        for (int w = 1; w < c_.walls; ++w) {
            phase(re_, im_, w - 1, T(1));
            for (int q = 0; q < c_.qubits; ++q) {
                angle(w, q, cos, sin);
                rotate(stride(q), cos, sin);
            }
        }
    }

    void expectations(T *out) {
        V *p = im_;  // probabilities take its place
        for (int64_t s = 0; s < size_; ++s) p[s] = re_[s] * re_[s] + im_[s] * im_[s];
        for (int q = 0; q < c_.qubits; ++q) {  // the most significant bit first; then it is summed out
            const int64_t half = stride(q);
            V difference = V{};
            for (int64_t s = 0; s < half; ++s) {
                difference += p[s] - p[s + half];
                p[s] += p[s + half];
            }
            for (int l = 0; l < count_; ++l) out[(first_ + l) * c_.qubits + q] = difference[l];
        }
    }

    // Adds to sums over tokens: of_walls (walls, qubits) and of_diags (walls - 1, 2**qubits), Im of conj(adjoint) * state.
    void backward(const T *grad, T *grad_z, double *of_walls, double *of_diags) {
        observe(grad);
        V of_z[kMaxQubits];
        for (int q = 0; q < c_.qubits; ++q) of_z[q] = V{};
        for (int w = c_.walls - 1; w >= 0; --w) {
            for (int q = 0; q < c_.qubits; ++q) {
                V cos, sin;
                angle(w, q, cos, sin);
                const V g = w > 0 ? undo(stride(q), cos, sin) : derivative(stride(q));
                if (c_.encodes[w]) of_z[q] += g;
                of_walls[w * c_.qubits + q] += sum(g);
            }
            if (w == 0) break;
            double *diag = of_diags + (w - 1) * size_;
            for (int64_t s = 0; s < size_; ++s) diag[s] += sum(lre_[s] * im_[s] - lim_[s] * re_[s]);
            phase(re_, im_, w - 1, T(-1));
            phase(lre_, lim_, w - 1, T(-1));
        }
        for (int q = 0; q < c_.qubits; ++q)
            for (int l = 0; l < count_; ++l) grad_z[(first_ + l) * c_.qubits + q] = of_z[q][l];
    }

  private:
    int64_t stride(int q) const { return int64_t(1) << (c_.qubits - 1 - q); }  // qubit 0 is the most significant bit

    void angle(int w, int q, V &cos, V &sin) const {
        const T c = c_.cos_wall[w * c_.qubits + q], s = c_.sin_wall[w * c_.qubits + q];
        if (c_.encodes[w]) {
            cos = cz_[q] * c - sz_[q] * s;
            sin = sz_[q] * c + cz_[q] * s;
        } else {
            cos = V{} + c;
            sin = V{} + s;
        }
    }

    void rotate(int64_t half, V cos, V sin) {
        for (int64_t base = 0; base < size_; base += 2 * half)
            for (int64_t i = base; i < base + half; ++i) {
                const V r0 = re_[i], r1 = re_[i + half], i0 = im_[i], i1 = im_[i + half];
                re_[i] = cos * r0 - sin * r1;
                re_[i + half] = sin * r0 + cos * r1;
                im_[i] = cos * i0 - sin * i1;
                im_[i + half] = sin * i0 + cos * i1;
            }
    }

    // Re <adjoint| -iY |state> on one qubit.
    V derivative(int64_t half) const {
        V total = V{};
        for (int64_t base = 0; base < size_; base += 2 * half)
            for (int64_t i = base; i < base + half; ++i)
                total += lre_[i + half] * re_[i] - lre_[i] * re_[i + half] + lim_[i + half] * im_[i] - lim_[i] * im_[i + half];
        return total;
    }

    // The same, and takes the rotation off both.
    V undo(int64_t half, V cos, V sin) {
        V total = V{};
        for (int64_t base = 0; base < size_; base += 2 * half)
            for (int64_t i = base; i < base + half; ++i) {
                const V r0 = re_[i], r1 = re_[i + half], i0 = im_[i], i1 = im_[i + half];
                const V a0 = lre_[i], a1 = lre_[i + half], b0 = lim_[i], b1 = lim_[i + half];
                total += a1 * r0 - a0 * r1 + b1 * i0 - b0 * i1;
                re_[i] = cos * r0 + sin * r1;
                re_[i + half] = cos * r1 - sin * r0;
                im_[i] = cos * i0 + sin * i1;
                im_[i + half] = cos * i1 - sin * i0;
                lre_[i] = cos * a0 + sin * a1;
                lre_[i + half] = cos * a1 - sin * a0;
                lim_[i] = cos * b0 + sin * b1;
                lim_[i + half] = cos * b1 - sin * b0;
            }
        return total;
    }

    void phase(V *re, V *im, int d, T sign) const {
        const T *cos = c_.cos_diag + d * size_, *sin = c_.sin_diag + d * size_;
        for (int64_t s = 0; s < size_; ++s) {
            const V r = re[s], i = im[s];
            const T a = cos[s], b = sign * sin[s];
            re[s] = r * a - i * b;
            im[s] = r * b + i * a;
        }
    }

    // The adjoint state: sum_q grad_q Z_q |state>.
    void observe(const T *grad) {
        lre_[0] = V{};
        for (int q = c_.qubits - 1, filled = 1; q >= 0; --q, filled *= 2) {
            V g = V{};
            for (int l = 0; l < count_; ++l) g[l] = grad[(first_ + l) * c_.qubits + q];
            for (int s = 0; s < filled; ++s) {
                lre_[s + filled] = lre_[s] - g;
                lre_[s] += g;
            }
        }
        for (int64_t s = 0; s < size_; ++s) {
            const V d = lre_[s];
            lre_[s] = d * re_[s];
            lim_[s] = d * im_[s];
        }
    }

    T sum(V v) const {
        T total = 0;
        for (int l = 0; l < kLanes; ++l) total += v[l];
        return total;
    }

    const Circuit<T> &c_;
    const int64_t size_;
    V *memory_, *re_, *im_, *lre_, *lim_;
    V cz_[kMaxQubits], sz_[kMaxQubits];
    int64_t first_ = 0;
    int count_ = 0;
};

// Calls work(block, chunk) for every block of tokens; a chunk's blocks come in order and on one thread.
template <typename T, typename Work>
void each_block(const Circuit<T> &c, int64_t chunk, int threads, bool adjoint, Work work) {
    const int64_t chunks = (c.tokens + chunk - 1) / chunk;
    std::atomic<int64_t> next{0};
    auto run = [&] {
        Block<T> block(c, adjoint);
        for (int64_t k; (k = next++) < chunks;)
            for (int64_t t = k * chunk; t < c.tokens && t < (k + 1) * chunk; t += Block<T>::lanes()) {
                block.load(t);
                block.forward();
                work(block, k);
            }
    };
    threads = int(chunks < threads ? chunks : threads);
#ifdef _OPENMP
    // PyTorch's own workers: they wait for their next work by spinning, for milliseconds, and would take the cores from others.
#pragma omp parallel num_threads(threads)
    run();
#else
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(run);
    run();
    for (auto &thread : others) thread.join();
#endif
}

template <typename T> void forward(const Circuit<T> &c, int64_t chunk, T *out, int threads) {
    each_block(c, chunk, threads, false, [&](Block<T> &block, int64_t) { block.expectations(out); });
}

template <typename T>
void backward(const Circuit<T> &c, int64_t chunk, const T *grad, T *grad_z, double *of_walls, double *of_diags, int threads) {
    const int64_t wall_size = int64_t(c.walls) * c.qubits, diag_size = int64_t(c.walls - 1) << c.qubits;
    each_block(c, chunk, threads, true, [&](Block<T> &block, int64_t k) {
        block.backward(grad, grad_z, of_walls + k * wall_size, of_diags + k * diag_size);
    });
}

}  // namespace

#define QTHA_FUNCTIONS(T, name)                                                                                                 \
    extern "C" void qtha_forward_##name(int64_t tokens, int qubits, int walls, const T *cos_z, const T *sin_z,                  \
                                        const uint8_t *encodes, const T *cos_wall, const T *sin_wall, const T *cos_diag,        \
                                        const T *sin_diag, int64_t chunk, int threads, T *out) {                                \
        forward<T>({tokens, qubits, walls, cos_z, sin_z, encodes, cos_wall, sin_wall, cos_diag, sin_diag}, chunk, out, threads); \
    }                                                                                                                           \
    extern "C" void qtha_backward_##name(int64_t tokens, int qubits, int walls, const T *cos_z, const T *sin_z,                 \
                                         const uint8_t *encodes, const T *cos_wall, const T *sin_wall, const T *cos_diag,       \
                                         const T *sin_diag, int64_t chunk, int threads, const T *grad, T *grad_z,               \
                                         double *of_walls, double *of_diags) {                                                  \
        backward<T>({tokens, qubits, walls, cos_z, sin_z, encodes, cos_wall, sin_wall, cos_diag, sin_diag}, chunk, grad,        \
                    grad_z, of_walls, of_diags, threads);                                                                       \
    }

QTHA_FUNCTIONS(float, f32)
QTHA_FUNCTIONS(double, f64)
