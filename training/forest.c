/* Evaluates a forest of regression trees that training/compile.py laid out as tables.
 *
 * A node is 16 bytes: its threshold, its feature and its left child, which is taken when the value is at most the
 * threshold; the right child is the node after it. A leaf is its own left child, under a threshold that nothing
 * exceeds, so that walking on does no harm: several trees are walked at once, as a single walk only waits for memory.
 * Thresholds are those of unscaled values, so no scaling is left to do. No library is needed, so it loads on any Debian.
 */

#include <stddef.h>
#include <stdint.h>

enum { FEATURES = 11, LANES = 8, BLOCK = 64 };

typedef struct {
    double threshold;
    uint32_t feature;
    uint32_t left;
} node;

__asm__(".section .rodata\n"
        ".balign 16\n"
        "nodes: .incbin \"nodes\"\n"
        "predictions: .incbin \"predictions\"\n"
        "roots: .incbin \"roots\"\n"
        ".previous\n");
extern const node nodes[] __attribute__((visibility("hidden")));
extern const double predictions[] __attribute__((visibility("hidden"))); /* of each node */
extern const uint32_t roots[] __attribute__((visibility("hidden")));     /* padded to whole lanes by empty trees */

/* The mean over the trees, added up in their order as scikit-learn does, so that not one bit differs. */
double winemon_predict(const double *wine) {
    double sum = 0.0;
    for (size_t tree = 0; tree < TREES; tree += LANES) {
        uint32_t at[LANES], moved;
        for (size_t lane = 0; lane < LANES; lane++)
            at[lane] = roots[tree + lane];
        do {
            moved = 0;
            for (size_t lane = 0; lane < LANES; lane++) {
                const node *n = &nodes[at[lane]];
                uint32_t next = n->left + (wine[n->feature] > n->threshold);
                moved |= next ^ at[lane];
                at[lane] = next;
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
        double values[BLOCK / LANES][FEATURES][LANES] = {0}, sum[BLOCK] = {0};
        for (size_t wine = 0; wine < block; wine++)
            for (size_t feature = 0; feature < FEATURES; feature++)
                values[wine / LANES][feature][wine % LANES] = *wines++;
        for (size_t tree = 0; tree < TREES; tree++)
            for (size_t first = 0; first < block; first += LANES) {
                const double(*value)[LANES] = values[first / LANES];
                uint32_t at[LANES], moved;
                for (size_t lane = 0; lane < LANES; lane++)
                    at[lane] = roots[tree];
                do {
                    moved = 0;
                    for (size_t lane = 0; lane < LANES; lane++) {
                        const node *n = &nodes[at[lane]];
                        uint32_t next = n->left + (value[n->feature][lane] > n->threshold);
                        moved |= next ^ at[lane];
                        at[lane] = next;
                    }
                } while (moved);
                for (size_t lane = 0; lane < LANES; lane++)
                    sum[first + lane] += predictions[at[lane]];
            }
        for (size_t wine = 0; wine < block; wine++)
            qualities[done + wine] = sum[wine] / TREES;
    }
}
