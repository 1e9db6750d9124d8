/* Reads wines from JSON and counts what is served, around the forest of forest.c.
 *
 * The reader takes only what it is sure of: the features, each once and under its plain name, as numbers that are
 * not negative and have no exponent. Anything else, right or wrong, it leaves to Pydantic, so it never decides what
 * a request may be; what it takes has the value that any correct parser gives it. `json` ends with a NUL, as Python's
 * bytes do; no rule accepts one, so none reads beyond it.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FEATURES = 11, BINS = 32 };

double winemon_predict(const double *wine);
void winemon_predict_many(const double *wines, double *qualities, size_t count);

typedef struct {
    char name[32]; /* with the quote that ends it, and zeros */
    double minimum, maximum;
} field;

typedef struct {
    const field *fields;
    /* BINS for each feature, and for the quality's bins and its histogram; an edge that none needs is infinite. */
    const double *edges;
    double *const *cells; /* addresses of the counts; NULL counts nothing */
    double *total;        /* the sum of all qualities */
} counts;

/* What app/predictor.py asks for: another number with each change of what the functions take. */
const uint32_t winemon_interface = 2;

/* What comes after this name, eight bytes at a time while there are as many; or NULL. */
static const char *skip(const char *at, const char *end, const char *name) {
    for (; end - at >= 8; at += 8, name += 8) {
        uint64_t text, part;
        memcpy(&text, at, 8);
        memcpy(&part, name, 8);
        if (text != part) {
            int same = __builtin_ctzll(text ^ part) / 8;
            return name[same] || name[same - 1] != '"' ? NULL : at + same; /* zeros of the text may equal the name's */
        }
        if (!name[7])
            return NULL;
    }
    for (; *name && *name == *at; name++)
        at++;
    return *name ? NULL : at;
}

static const char *space(const char *at) {
    while (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')
        at++;
    return at;
}

/* What comes after this text and the space around it, or NULL. */
static const char *expect(const char *at, const char *text) {
    for (at = space(at); *text; at++, text++)
        if (*at != *text)
            return NULL;
    return space(at);
}

/* digits / 10^scale to the nearest double, ties to even. */
static double decimal(uint64_t digits, unsigned scale) {
    static const double exact[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,
                                   1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19};
    if (digits <= UINT64_C(1) << 53 || scale == 0)
        return (double)digits / exact[scale]; /* of two exact numbers, or by one: rounded once */
    /* 54 bits or more of the quotient, and one that says whether there are more. */
    unsigned __int128 numerator = (unsigned __int128)digits << 64, power = (uint64_t)exact[scale];
    return (double)(numerator / power << 1 | (numerator % power != 0)) * 0x1p-65;
}

/* Reads up to 19 digits, and as many decimals. */
static const char *number(const char *at, double *value) {
    const uint64_t room = UINT64_C(1000000000000000000); /* for one more digit */
    const char *start = at;
    uint64_t digits = 0;
    unsigned scale = 0;
    if (*at == '0')
        at++;
    else
        for (; *at >= '0' && *at <= '9' && digits < room; at++)
            digits = 10 * digits + (uint64_t)(*at - '0');
    if (at == start)
        return NULL;
    if (*at == '.') {
        for (at++; *at >= '0' && *at <= '9' && digits < room && scale < 19; at++, scale++)
            digits = 10 * digits + (uint64_t)(*at - '0');
        if (scale == 0)
            return NULL;
    }
    *value = decimal(digits, scale);
    return at; /* at what ends it, or at a digit or exponent that the caller does not expect */
}

/* Reads one object of a text that goes on to `end`; what comes after it, or NULL. */
static const char *read_wine(const char *at, const char *end, const field *fields, double *wine) {
    uint32_t seen = 0;
    size_t next = 0;
    at = expect(at, "{");
    while (at && *at++ == '"') {
        /* The usual order is tried first. */
        const char *value = NULL;
        size_t feature = next;
        for (size_t tried = 0; tried < FEATURES; tried++, feature = (feature + 1) % FEATURES) {
            if ((value = skip(at, end, fields[feature].name)))
                break;
        }
        if (!value || seen >> feature & 1 || !(value = expect(value, ":")))
            return NULL;
        if (!(at = number(value, &wine[feature])))
            return NULL;
        if (wine[feature] < fields[feature].minimum || wine[feature] > fields[feature].maximum)
            return NULL;
        seen |= UINT32_C(1) << feature;
        next = (feature + 1) % FEATURES;
        at = space(at);
        if (*at == '}')
            return seen == (UINT32_C(1) << FEATURES) - 1 ? at + 1 : NULL;
        at = expect(at, ",");
    }
    return NULL;
}

/* Counts each value of the wines, and their qualities, into bins: as many edges as are not greater than the value are
 * below its bin. */
void winemon_count(const counts *into, const double *wines, const double *qualities, size_t count) {
    if (!into->cells)
        return;
    for (size_t wine = 0; wine < count; wine++, wines += FEATURES) {
        for (size_t feature = 0; feature < FEATURES + 2; feature++) {
            double value = feature < FEATURES ? wines[feature] : qualities[wine];
            size_t bin = BINS * feature;
            for (size_t step = BINS / 2; step; step /= 2)
                bin += step & -(size_t)(into->edges[bin + step - 1] <= value);
            *into->cells[bin] += 1.0;
        }
        *into->total += qualities[wine];
    }
}

/* Reads, predicts and counts the wine that a JSON text is; NaN, and nothing is counted, where it is not sure of it. */
double winemon_serve(const counts *into, const char *json, size_t length) {
    double wine[FEATURES];
    const char *at = read_wine(json, json + length, into->fields, wine);
    if (!at || space(at) != json + length)
        return NAN;
    double quality = winemon_predict(wine);
    winemon_count(into, wine, &quality, 1);
    return quality;
}

/* As above for {"samples": [wine, ...]}: how many there are, at most `most`, or 0. */
size_t winemon_serve_many(const counts *into, const char *json, size_t length, double *wines, double *qualities,
                          size_t most) {
    size_t count = 0;
    const char *at = expect(json, "{");
    if (!at || !(at = expect(at, "\"samples\"")) || !(at = expect(at, ":")) || !(at = expect(at, "[")))
        return 0;
    for (;; at++) {
        if (count == most || !(at = read_wine(at, json + length, into->fields, wines + FEATURES * count)))
            return 0;
        count++;
        at = space(at);
        if (*at != ',')
            break;
    }
    if (!(at = expect(at, "]")) || !(at = expect(at, "}")) || at != json + length)
        return 0;
    winemon_predict_many(wines, qualities, count);
    winemon_count(into, wines, qualities, count);
    return count;
}
