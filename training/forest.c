/* Evaluates a forest of regression trees that training/compile.py laid out as tables.
 *
 * A node has a threshold, a feature and a left child, which is taken when the value is at most the threshold; the right
 * child is the node after it. A leaf is its own left child, under a threshold that nothing exceeds, so that walking on
 * does no harm: several walks go at once, as a single one only waits for memory.
 * Thresholds are those of unscaled values, so no scaling is left to do, and they and the values are compared as places
 * in the order of all doubles, which takes one instruction less. Any libc has the one function it may need, memset.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FEATURES = 11, LANES = 8, BLOCK = 256, SURE = 8 };

__asm__(".section .rodata\n"
        ".balign 16\n"
        "thresholds: .incbin \"thresholds\"\n"
        "predictions: .incbin \"predictions\"\n"
        "left: .incbin \"left\"\n"
        "roots: .incbin \"roots\"\n"
        "features: .incbin \"features\"\n"
        ".previous\n");
extern const uint64_t thresholds[] __attribute__((visibility("hidden")));
extern const double predictions[] __attribute__((visibility("hidden")));
extern const uint32_t left[] __attribute__((visibility("hidden")));
extern const uint32_t roots[] __attribute__((visibility("hidden"))); /* padded to whole lanes by empty trees */
extern const uint8_t features[] __attribute__((visibility("hidden")));

static uint64_t place(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits >> 63 ? -bits : bits + (UINT64_C(1) << 63);
}

/* The mean over the trees, added up in their order as scikit-learn does, so that not one bit differs. */
double winemon_predict(const double *wine) {
    uint64_t values[FEATURES];
    double sum = 0.0;
    for (size_t feature = 0; feature < FEATURES; feature++)
        values[feature] = place(wine[feature]);
    for (size_t tree = 0; tree < TREES; tree += LANES) {
        uint32_t at[LANES], moved;
        for (size_t lane = 0; lane < LANES; lane++)
            at[lane] = roots[tree + lane];
        do {
            moved = 0;
            for (size_t lane = 0; lane < LANES; lane++) {
                uint32_t node = at[lane];
                at[lane] = left[node] + (thresholds[node] < values[features[node]]);
                moved |= at[lane] ^ node;
            }
        } while (moved);
        for (size_t lane = 0; lane < LANES; lane++)
            sum += predictions[at[lane]];
    }
    return sum / TREES;
}

/* As above for many wines. Here the lanes are wines: a block of them walks a tree while that is in the cache. */
void winemon_predict_many(const double *wines, double *qualities, size_t count) {
    for (size_t done = 0; done < count; done += BLOCK) {
        size_t block = count - done < BLOCK ? count - done : BLOCK;
        uint64_t values[BLOCK / LANES][FEATURES][LANES] = {0};
        double sum[BLOCK] = {0};
        for (size_t wine = 0; wine < block; wine++)
            for (size_t feature = 0; feature < FEATURES; feature++)
                values[wine / LANES][feature][wine % LANES] = place(*wines++);
        for (size_t tree = 0; tree < TREES; tree++)
            for (size_t first = 0; first < block; first += LANES) {
                const uint64_t(*value)[LANES] = values[first / LANES];
                uint32_t at[LANES], moved;
                for (size_t lane = 0; lane < LANES; lane++)
                    at[lane] = roots[tree];
                for (size_t step = 0; step < SURE; step++) /* whether they moved is asked later */
                    for (size_t lane = 0; lane < LANES; lane++)
                        at[lane] = left[at[lane]] + (thresholds[at[lane]] < value[features[at[lane]]][lane]);
                do {
                    moved = 0;
                    for (size_t lane = 0; lane < LANES; lane++) {
                        uint32_t node = at[lane];
                        at[lane] = left[node] + (thresholds[node] < value[features[node]][lane]);
                        moved |= at[lane] ^ node;
                    }
                } while (moved);
                for (size_t lane = 0; lane < LANES; lane++)
                    sum[first + lane] += predictions[at[lane]];
            }
        for (size_t wine = 0; wine < block; wine++)
            qualities[done + wine] = sum[wine] / TREES;
    }
}
