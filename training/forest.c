/* Evaluates a forest of regression trees that training/compile.py laid out as tables.
 *
 * A node is 16 bytes: its threshold, its feature and its left child, which is taken when the value is at most the
 * threshold; the right child is the node after it. A leaf is its own left child, under a threshold that nothing
 * exceeds, so that walking on does no harm: several trees are walked at once, as a single walk only waits for memory.
 * Thresholds are those of unscaled values, so no scaling is left to do. No library is needed, so it loads on any Debian.
 */

#include <stddef.h>
#include <stdint.h>

enum { FEATURES = 11, LANES = 8 };

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

/* As above for many wines: here the lanes are wines, which all walk the tree that is in the cache. */
void winemon_predict_many(const double *wines, double *qualities, size_t count) {
    size_t done = 0;
    for (; done + LANES <= count; done += LANES, wines += LANES * FEATURES) {
        double sum[LANES] = {0};
        for (size_t tree = 0; tree < TREES; tree++) {
            uint32_t at[LANES], moved;
            for (size_t lane = 0; lane < LANES; lane++)
                at[lane] = roots[tree];
            do {
                moved = 0;
                for (size_t lane = 0; lane < LANES; lane++) {
                    const node *n = &nodes[at[lane]];
                    uint32_t next = n->left + (wines[lane * FEATURES + n->feature] > n->threshold);
                    moved |= next ^ at[lane];
                    at[lane] = next;
                }
            } while (moved);
            for (size_t lane = 0; lane < LANES; lane++)
                sum[lane] += predictions[at[lane]];
        }
        for (size_t lane = 0; lane < LANES; lane++)
            qualities[done + lane] = sum[lane] / TREES;
    }
    for (; done < count; done++, wines += FEATURES)
        qualities[done] = winemon_predict(wines);
}

/* Counts each value of the wines, and their qualities as one more feature, into bins: one more than the feature has
 * edges, as many edges as are not greater than the value below it. `ends` says where each feature's edges end;
 * `cells` are the addresses of the counts. */
void winemon_count(const double *wines, const double *qualities, size_t count, const double *edges,
                   const uint32_t *ends, double *const *cells) {
    for (size_t wine = 0; wine < count; wine++, wines += FEATURES) {
        size_t edge = 0;
        for (size_t feature = 0; feature <= FEATURES; feature++) {
            double value = feature < FEATURES ? wines[feature] : qualities[wine];
            size_t bin = edge + feature;
            for (; edge < ends[feature]; edge++)
                bin += edges[edge] <= value;
            *cells[bin] += 1.0;
        }
    }
}

/* Both, for one wine. */
double winemon_serve(const double *wine, const double *edges, const uint32_t *ends, double *const *cells) {
    double quality = winemon_predict(wine);
    winemon_count(wine, &quality, 1, edges, ends, cells);
    return quality;
}
