#include "sampling.h"

#include <float.h>
#include <string.h>

#include <algorithm>

namespace guanaco {
namespace {

// Buckets of weights by their highest bits (exponent and three bits of the mantissa). A larger weight is never in a
// lower bucket, so only two buckets need to be sorted: the one where the filters end, and the one of the sampled token.
constexpr int kShift = 20, kBuckets = 1 << (31 - kShift);

uint32_t bits_of(float weight) {  // of a number that is not negative: in the order of the numbers
    uint32_t bits;
    memcpy(&bits, &weight, 4);
    return bits;
}

int bucket(float weight) { return int(bits_of(weight) >> kShift); }

// The index of the largest number, the first if several are equal. NaN is skipped; 0 if all are NaN.
int64_t argmax(const float* x, int64_t n) {
    int64_t best = 0;
    while (best < n - 1 && x[best] != x[best]) best++;
    for (int64_t i = best + 1; i < n; i++) {
        if (x[i] > x[best]) best = i;
    }
    return x[best] != x[best] ? 0 : best;
}

// Whether a weight can be sampled. NaN can't, since it compares as false.
bool counts(float weight) { return weight > 0; }

// The numbers of a Draw, made valid: NaN filters nothing, and values outside the range become its nearest end.
struct Settings {
    explicit Settings(const Draw& d)
        : uniform(d.uniform >= 0 ? std::min(d.uniform, 1 - DBL_EPSILON / 2) : 0),
          temperature(d.temperature > 0 ? std::min(d.temperature, FLT_MAX) : 0),
          top_p(d.top_p < 1 ? std::max(d.top_p, 0.0f) : 1),
          min_p(d.min_p > 0 ? std::min(d.min_p, 1.0f) : 0),
          top_k(std::max(d.top_k, 0)) {}
    bool filtered() const { return top_k > 0 || top_p < 1 || min_p > 0; }

    double uniform;
    float temperature;
    double top_p, min_p;  // a top_p of 0 (the request's was below float32) keeps the likeliest token
    int32_t top_k;
};

// Inverse transform sampling over weights in the order of their ids. Sums in double, since float would round over
// 50,000 terms. -1 if no weight counts.
int64_t pick(const float* weights, int64_t n, double uniform) {
    double total = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) total += counts(weights[i]) ? weights[i] : 0;
    double target = total * uniform;
    int64_t last = -1;
    for (int64_t i = 0; i < n; i++) {
        if (!counts(weights[i])) continue;
        last = i;
        sum += weights[i];
        if (sum > target) return i;
    }
    return last;  // the sums' rounding: the target was the total itself
}

class Filtered {
  public:
    // keys: room for n.
    Filtered(const float* weights, int64_t n, uint64_t* keys) : weights_(weights), n_(n), keys_(keys) {
        for (int64_t i = 0; i < n; i++) {
            if (!counts(weights[i])) continue;  // the bits of a negative NaN would name a bucket that isn't there
            int b = bucket(weights[i]);
            counts_[b]++;
            sums_[b] += weights[i];
        }
        for (int b = 0; b < kBuckets; b++) total_ += sums_[b];
    }

    // Sample from the tokens that pass the filters, ordered from the likeliest to the least likely, equal ones by id.
    // The token that crosses top_p passes, and the likeliest one always does. -1 if no weight counts.
    int64_t pick(const Settings& d) {
        int highest = kBuckets - 1;
        while (highest >= 0 && counts_[highest] == 0) highest--;
        if (highest < 0) return -1;
        int64_t count = 0;
        double sum = 0;
        int cut = highest, lowest = std::min(bucket(float(d.min_p)), highest);
        for (; cut > lowest; cut--) {
            bool ends = (d.top_k > 0 && count + counts_[cut] >= d.top_k) ||
                        (d.top_p < 1 && sum + sums_[cut] >= d.top_p * total_);
            if (counts_[cut] > 0 && ends) break;
            count += counts_[cut];
            sum += sums_[cut];
        }
        double above = sum;
        int64_t members = sort(cut), last = -1;
        for (int64_t j = 0; j < members; j++, count++) {
            float weight = weights_[id(j)];
            bool passes = (d.top_k <= 0 || count < d.top_k) && (d.top_p >= 1 || sum < d.top_p * total_) &&
                          weight >= d.min_p;
            if (count > 0 && !passes) break;
            sum += weight;
            last = j;
        }
        double target = sum * d.uniform;
        if (target >= above && last >= 0) return walk(above, target, last);
        double before = 0;
        int b = highest;  // above the cut: something is kept there, since the target is below the sum of it
        for (; b > cut + 1 && before + sums_[b] <= target; b--) before += sums_[b];
        while (b < highest && counts_[b] == 0) b++;  // the sums' rounding went past the last one that is not empty
        return walk(before, target, sort(b) - 1);
    }

  private:
    // Sort the members of a bucket into keys. Returns how many there are.
    int64_t sort(int b) {
        int64_t count = 0;
        for (int64_t i = 0; i < n_; i++) {
            if (counts(weights_[i]) && bucket(weights_[i]) == b) {
                keys_[count++] = uint64_t(0x7fffffff - bits_of(weights_[i])) << 32 | uint64_t(i);
            }
        }
        std::sort(keys_, keys_ + count);
        return count;
    }

    int64_t id(int64_t j) const { return int64_t(keys_[j] & 0xffffffff); }

    int64_t walk(double sum, double target, int64_t last) const {
        for (int64_t j = 0; j < last; j++) {
            sum += weights_[id(j)];
            if (sum > target) return id(j);
        }
        return id(last);
    }

    const float* weights_;
    int64_t n_;
    uint64_t* keys_;
    int32_t counts_[kBuckets] = {};
    double sums_[kBuckets] = {};
    double total_ = 0;
};

}  // namespace

void draw(Context& context, const float* logits, int64_t rows, int64_t vocab, const Draw* draws, int64_t* out) {
    Context::PerThread scratch = context.per_thread(3 * vocab + 2);
    context.pool.each(rows, [&](int64_t r, int thread) {
        const float* x = logits + r * vocab;
        const Settings d(draws[r]);
        int64_t best = argmax(x, vocab);
        out[r] = best;
        if (d.temperature == 0) return;
        float* weights = scratch.of(thread);
        // Subtracting the largest first keeps a tiny temperature from overflowing.
        context.kernels->exp_row(x, vocab, x[best], d.temperature, weights);
        uint64_t* keys = (uint64_t*)(weights + (vocab + 1) / 2 * 2);
        int64_t token = d.filtered() ? Filtered(weights, vocab, keys).pick(d) : pick(weights, vocab, d.uniform);
        if (token >= 0) out[r] = token;
    });
}

}  // namespace guanaco
