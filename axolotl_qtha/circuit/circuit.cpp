// The circuit of `ansatz.py` on a CPU: one token per SIMD lane, a block of tokens in the first-level cache.
//
// The circuit comes as alternating walls (RY on every qubit) and diagonals (a CRZ ring), see `torch_engine.py`. Only RY angles of
// encoding walls differ between tokens; by the addition formulas they need cos and sin of z / 2, which are passed in. With a few
// tokens (`infer`) a call of PyTorch costs more than what it computes: there all is done here, from z to h of `bottleneck.py`.
//
// A token may have several such circuits side by side, each with angles of its own on its share of the token's columns.
//
// Plain C interface, called through ctypes. Sums over tokens are made per chunk of tokens, in an order that does not depend on the
// number of threads.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int kBytes = 64;  // of a vector: one register; where registers are half as wide, this would take twice the time
#else
constexpr int kBytes = 32;
#endif
constexpr int kMaxQubits = 12;
constexpr int kSliceQubits = 6;  // 64 amplitudes of two states are 16 KiB: they stay in the first-level cache
constexpr int kGap = 5;  // vectors between arrays: at a power of two apart, all would fall into the same sets of the cache

template <typename T> struct Lanes;
template <> struct Lanes<float> { typedef float type __attribute__((vector_size(kBytes))); };
template <> struct Lanes<double> { typedef double type __attribute__((vector_size(kBytes))); };

template <typename T> struct Circuit {
    int64_t tokens;
    int circuits, qubits, walls;     // of a token; of each circuit
    const T *cos_z, *sin_z;          // (tokens, width), of z / 2; or null, and what follows the diagonals is given
    const uint8_t *encodes;          // (walls): whether z is added to the wall's angles
    const T *cos_wall, *sin_wall;    // (walls, width), of half the angle all tokens share
    const T *cos_diag, *sin_diag;    // (walls - 1, circuits, 2**qubits)
    const T *z = nullptr;            // (tokens, width)
    const T *scale = nullptr;        // (width), or null: z is multiplied by it,
    bool bounded = false;            // and enters as pi * tanh(z / pi),
    T half = 0;                      // times this

    int width() const { return circuits * qubits; }
};

// What `infer` takes but for the tokens: `_Fixed` of native.py.
template <typename T> struct Fixed {
    const uint8_t *encodes;
    const T *cos_wall, *sin_wall, *cos_diag, *sin_diag, *scale;
    const T *w_c, *w_q;  // (width, width)
    double half;
    int circuits, qubits, walls, bounded, product;
};

template <typename T> class Block {
    using V = typename Lanes<T>::type;
    static constexpr int kLanes = kBytes / sizeof(T);

  public:
    explicit Block(const Circuit<T> &c, bool adjoint)
        : c_(c), size_(int64_t(1) << c.qubits), memory_(nullptr) {
        const size_t apart = size_ + kGap, count = apart * (adjoint ? 4 : 2);
        memory_ = static_cast<V *>(std::aligned_alloc(kBytes, count * sizeof(V)));
        re_ = memory_;
        im_ = re_ + apart;
        lre_ = adjoint ? im_ + apart : nullptr;
        lim_ = adjoint ? lre_ + apart : nullptr;
    }
    ~Block() { std::free(memory_); }
    Block(const Block &) = delete;
    Block &operator=(const Block &) = delete;

    static constexpr int lanes() { return kLanes; }

    void load(int circuit, int64_t first) {
        circuit_ = circuit;
        first_ = first;
        count_ = c_.tokens - first < kLanes ? int(c_.tokens - first) : kLanes;
        for (int q = 0; q < c_.qubits; ++q) {
            cz_[q] = V{} + T(1);
            sz_[q] = V{};
            for (int l = 0; l < count_; ++l) {
                const int64_t i = at(l, q);
                const T angle = c_.z ? half_angle(c_.z[i], column(q)) : 0;
                cz_[q][l] = c_.z ? std::cos(angle) : c_.cos_z[i];
                sz_[q][l] = c_.z ? std::sin(angle) : c_.sin_z[i];
            }
        }
    }

    void forward() {
        V cos[kMaxQubits], sin[kMaxQubits];
        angles(0, cos, sin);
        re_[0] = V{} + T(1);
        for (int q = c_.qubits - 1, filled = 1; q >= 0; --q, filled *= 2) {  // RYs on |0>: a real product state
            for (int s = 0; s < filled; ++s) {
                re_[s + filled] = re_[s] * sin[q];
                re_[s] *= cos[q];
            }
        }
        std::memset(static_cast<void *>(im_), 0, size_ * sizeof(V));
        for (int w = 1; w < c_.walls; ++w) {
            phase(w - 1);
            angles(w, cos, sin);
            each_pair([&](int q) { rotate(q, cos[q], sin[q]); },
                      [&](int q, int64_t from, int64_t to) { rotate(q, from, to, cos + q, sin + q); });
        }
    }

    void expectations(T *out) {
        V *p = lre_ ? lre_ : im_;  // probabilities, where nothing is yet, or in the place of what is no more needed
        for (int64_t s = 0; s < size_; ++s) p[s] = re_[s] * re_[s] + im_[s] * im_[s];
        for (int q = 0; q < c_.qubits; ++q) {  // the most significant bit first; then it is summed out
            const int64_t half = stride(q);
            V difference = V{};
            for (int64_t s = 0; s < half; ++s) {
                difference += p[s] - p[s + half];
                p[s] += p[s + half];
            }
            for (int l = 0; l < count_; ++l) out[at(l, q)] = difference[l];
        }
    }

    // Adds to sums over tokens: of_walls (walls, width) and of_diags (walls - 1, circuits, 2**qubits), Im of conj(adjoint) * state.
    // Also stores <Z>, as `forward` does.
    void backward(const T *grad, T *values, T *grad_z, double *of_walls, double *of_diags) {
        expectations(values);
        observe(grad);
        V of_z[kMaxQubits], of_wall[kMaxQubits], cos[kMaxQubits], sin[kMaxQubits];
        for (int q = 0; q < c_.qubits; ++q) of_z[q] = V{};
        for (int w = c_.walls - 1; w >= 0; --w) {
            for (int q = 0; q < c_.qubits; ++q) of_wall[q] = V{};
            angles(w, cos, sin);
            if (w > 0)
                each_pair([&](int q) { of_wall[q] = undo(q, cos[q], sin[q]); },
                          [&](int q, int64_t from, int64_t to) { undo(q, from, to, cos + q, sin + q, of_wall + q); });
            else
                for (int q = 0; q < c_.qubits; ++q) of_wall[q] = derivative(stride(q));
            for (int q = 0; q < c_.qubits; ++q) {
                if (c_.encodes[w]) of_z[q] += of_wall[q];
                of_walls[w * c_.width() + column(q)] += sum(of_wall[q]);
            }
            if (w > 0) undo_phase(w - 1, of_diags + diagonal(w - 1));
        }
        for (int q = 0; q < c_.qubits; ++q)
            for (int l = 0; l < count_; ++l) grad_z[at(l, q)] = of_z[q][l];
    }

  private:
    int column(int q) const { return circuit_ * c_.qubits + q; }
    int64_t at(int lane, int q) const { return (first_ + lane) * c_.width() + column(q); }
    int64_t diagonal(int d) const { return (int64_t(d) * c_.circuits + circuit_) * size_; }

    T half_angle(T z, int column) const {
        constexpr T pi = T(3.14159265358979323846);
        if (c_.scale) z *= c_.scale[column];
        return c_.half * (c_.bounded ? pi * std::tanh(z / pi) : z);
    }

    int64_t stride(int q) const { return int64_t(1) << (c_.qubits - 1 - q); }  // qubit 0 is the most significant bit

    void angles(int w, V *cos, V *sin) const {
        for (int q = 0; q < c_.qubits; ++q) {
            const int i = w * c_.width() + column(q);
            const T c = c_.cos_wall[i], s = c_.sin_wall[i];
            cos[q] = c_.encodes[w] ? cz_[q] * c - sz_[q] * s : V{} + c;
            sin[q] = c_.encodes[w] ? sz_[q] * c + cz_[q] * s : V{} + s;
        }
    }

    // Two qubits at a time, which halves the passes over the state; the last ones slice by slice. one(q); two(q, from, to).
    template <typename One, typename Two> void each_pair(One one, Two two) const {
        int q = c_.qubits % 2;
        if (q) one(0);
        for (; c_.qubits - q > kSliceQubits; q += 2) two(q, 0, size_);
        const int64_t slice = int64_t(1) << (c_.qubits - q);
        for (int64_t from = 0; from < size_; from += slice)
            for (int p = q; p < c_.qubits; p += 2) two(p, from, from + slice);
    }

    static void turn(V &a, V &b, V cos, V sin) {
        const V old = a;
        a = cos * old - sin * b;
        b = sin * old + cos * b;
    }

    void rotate(int q, V cos, V sin) {
        const int64_t half = stride(q);
        for (int64_t base = 0; base < size_; base += 2 * half)
            for (int64_t i = base; i < base + half; ++i) {
                turn(re_[i], re_[i + half], cos, sin);
                turn(im_[i], im_[i + half], cos, sin);
            }
    }

    // Four amplitudes of one array, by the bits of two qubits.
    struct Four {
        V *at;
        int64_t half, next;
        V a = at[0], b = at[next], c = at[half], d = at[half + next];

        void turn(const V *cos, const V *sin) {
            Block::turn(a, c, cos[0], sin[0]);
            Block::turn(b, d, cos[0], sin[0]);
            Block::turn(a, b, cos[1], sin[1]);
            Block::turn(c, d, cos[1], sin[1]);
        }
        void store() {
            at[0] = a, at[next] = b;
            at[half] = c, at[half + next] = d;
        }
    };

    void rotate(int q, int64_t from, int64_t to, const V *cosines, const V *sines) {
        const V cos[2] = {cosines[0], cosines[1]}, sin[2] = {sines[0], sines[1]};  // so that they stay in registers
        const int64_t half = stride(q), next = half / 2;
        for (int64_t base = from; base < to; base += 2 * half)
            for (int64_t i = base; i < base + next; ++i)
                for (V *array : {re_, im_}) {
                    Four x{array + i, half, next};
                    x.turn(cos, sin);
                    x.store();
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
    V undo(int q, V cos, V sin) {
        const int64_t half = stride(q);
        const V total = derivative(half);
        for (V *array : {re_, im_, lre_, lim_})
            for (int64_t base = 0; base < size_; base += 2 * half)
                for (int64_t i = base; i < base + half; ++i) turn(array[i], array[i + half], cos, -sin);
        return total;
    }

    void undo(int q, int64_t from, int64_t to, const V *cosines, const V *sines, V *totals) {
        const V cos[2] = {cosines[0], cosines[1]}, sin[2] = {-sines[0], -sines[1]};
        const int64_t half = stride(q), next = half / 2;
        V first = totals[0], second = totals[1];
        for (int64_t base = from; base < to; base += 2 * half)
            for (int64_t i = base; i < base + next; ++i)
                for (int part = 0; part < 2; ++part) {
                    Four x{(part ? im_ : re_) + i, half, next}, y{(part ? lim_ : lre_) + i, half, next};
                    first += y.c * x.a - y.a * x.c + y.d * x.b - y.b * x.d;
                    second += y.b * x.a - y.a * x.b + y.d * x.c - y.c * x.d;
                    x.turn(cos, sin);
                    y.turn(cos, sin);
                    x.store();
                    y.store();
                }
        totals[0] = first;
        totals[1] = second;
    }

    void phase(int d) {
        const T *cos = c_.cos_diag + diagonal(d), *sin = c_.sin_diag + diagonal(d);
        for (int64_t s = 0; s < size_; ++s) {
            const V r = re_[s], i = im_[s];
            re_[s] = r * cos[s] - i * sin[s];
            im_[s] = r * sin[s] + i * cos[s];
        }
    }

    // Adds Im of conj(adjoint) * state, then takes the phases off both.
    void undo_phase(int d, double *of_diag) {
        const T *cos = c_.cos_diag + diagonal(d), *sin = c_.sin_diag + diagonal(d);
        for (int64_t s = 0; s < size_; ++s) {
            const V r = re_[s], i = im_[s], a = lre_[s], b = lim_[s];
            of_diag[s] += sum(a * i - b * r);
            re_[s] = r * cos[s] + i * sin[s];
            im_[s] = i * cos[s] - r * sin[s];
            lre_[s] = a * cos[s] + b * sin[s];
            lim_[s] = b * cos[s] - a * sin[s];
        }
    }

    // The adjoint state: sum_q grad_q Z_q |state>.
    void observe(const T *grad) {
        lre_[0] = V{};
        for (int q = c_.qubits - 1, filled = 1; q >= 0; --q, filled *= 2) {
            V g = V{};
            for (int l = 0; l < count_; ++l) g[l] = grad[at(l, q)];
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

    // In halves: lane by lane, each addition would wait for the one before.
    static T sum(V v) {
        typedef T Half __attribute__((vector_size(kBytes / 2)));
        typedef T Quarter __attribute__((vector_size(kBytes / 4)));
        Half halves[2];
        std::memcpy(halves, &v, sizeof v);
        halves[0] += halves[1];
        Quarter quarters[2];
        std::memcpy(quarters, halves, sizeof quarters);
        quarters[0] += quarters[1];
        T total = 0;
        for (int l = 0; l < kLanes / 4; ++l) total += quarters[0][l];
        return total;
    }

    const Circuit<T> &c_;
    const int64_t size_;
    V *memory_, *re_, *im_, *lre_, *lim_;
    V cz_[kMaxQubits], sz_[kMaxQubits];
    int64_t first_ = 0;
    int circuit_ = 0, count_ = 0;
};

// Calls work(block, chunk) for every circuit and block of tokens; a chunk's blocks come in order and on one thread.
template <typename T, typename Work>
void each_block(const Circuit<T> &c, int64_t chunk, int threads, bool adjoint, Work work) {
    const int64_t chunks = (c.tokens + chunk - 1) / chunk;
    std::atomic<int64_t> next{0};
    auto run = [&] {
        Block<T> block(c, adjoint);
        for (int64_t k; (k = next++) < chunks;)
            for (int circuit = 0; circuit < c.circuits; ++circuit)
                for (int64_t t = k * chunk; t < c.tokens && t < (k + 1) * chunk; t += Block<T>::lanes()) {
                    block.load(circuit, t);
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
void backward(const Circuit<T> &c, int64_t chunk, const T *grad, T *values, T *grad_z, double *of_walls, double *of_diags,
              int threads) {
    const int64_t wall_size = int64_t(c.walls) * c.width(), diag_size = int64_t(c.walls - 1) * c.circuits << c.qubits;
    each_block(c, chunk, threads, true, [&](Block<T> &block, int64_t k) {
        block.backward(grad, values, grad_z, of_walls + k * wall_size, of_diags + k * diag_size);
    });
}

// h = W_C z + W_Q q, or the product of the two; returns whether all q are numbers: z infinite or NaN makes its token's q NaN.
template <typename T> int infer(const Fixed<T> &f, int64_t tokens, const T *z, int64_t chunk, int threads, T *h) {
    const Circuit<T> c{tokens, f.circuits, f.qubits, f.walls, nullptr, nullptr, f.encodes, f.cos_wall, f.sin_wall, f.cos_diag,
                       f.sin_diag, z, f.scale, f.bounded != 0, T(f.half)};
    forward<T>(c, chunk, h, threads);
    const int width = c.width();
    std::vector<T> q(width);
    for (int64_t t = 0; t < tokens; ++t, z += width, h += width) {
        for (int i = 0; i < width; ++i) {
            if (std::isnan(h[i])) return 0;
            q[i] = h[i];
        }
        for (int i = 0; i < width; ++i) {
            T linear = 0, branch = 0;
            for (int j = 0; j < width; ++j) {
                linear += f.w_c[i * width + j] * z[j];
                branch += f.w_q[i * width + j] * q[j];
            }
            h[i] = f.product ? linear * branch : linear + branch;
        }
    }
    return 1;
}

}  // namespace

#define QTHA_FUNCTIONS(T, name)                                                                                                \
    extern "C" void qtha_forward_##name(int64_t tokens, int circuits, int qubits, int walls, const T *cos_z, const T *sin_z,   \
                                        const uint8_t *encodes, const T *cos_wall, const T *sin_wall, const T *cos_diag,       \
                                        const T *sin_diag, int64_t chunk, int threads, T *out) {                               \
        forward<T>({tokens, circuits, qubits, walls, cos_z, sin_z, encodes, cos_wall, sin_wall, cos_diag, sin_diag}, chunk,    \
                   out, threads);                                                                                              \
    }                                                                                                                          \
    extern "C" void qtha_backward_##name(int64_t tokens, int circuits, int qubits, int walls, const T *cos_z, const T *sin_z,  \
                                         const uint8_t *encodes, const T *cos_wall, const T *sin_wall, const T *cos_diag,      \
                                         const T *sin_diag, int64_t chunk, int threads, const T *grad, T *values, T *grad_z,   \
                                         double *of_walls, double *of_diags) {                                                 \
        backward<T>({tokens, circuits, qubits, walls, cos_z, sin_z, encodes, cos_wall, sin_wall, cos_diag, sin_diag}, chunk,   \
                    grad, values, grad_z, of_walls, of_diags, threads);                                                        \
    }                                                                                                                          \
    extern "C" int qtha_infer_##name(const Fixed<T> *f, int64_t tokens, const T *z, int64_t chunk, int threads, T *h) {        \
        return infer<T>(*f, tokens, z, chunk, threads, h);                                                                     \
    }

QTHA_FUNCTIONS(float, f32)
QTHA_FUNCTIONS(double, f64)
