/* A whole native runner (the protocol is in targets/remote/native.py), of one linear layer.

   Its "model" file: the text "FEATURES CLASSES\n", then FEATURES*CLASSES weights and CLASSES
   biases, float32. A program for a real runtime differs in load() and compute() only. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#if defined(__aarch64__)
#define MACHINE "aarch64"
#elif defined(__x86_64__)
#define MACHINE "x86_64"
#else
#define MACHINE "unknown"
#endif

struct model { long features, classes; float *weights; };

static struct model models[64];
static int count;
static float *images, *logits;
static long n, features;

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void fail(const char *text) {
    printf("{\"error\": \"UsageError\", \"message\": \"%s\"}\n", text);
}

static int load(const char *path) {
    struct model *m = &models[count];
    FILE *file = fopen(path, "rb");
    if (!file || fscanf(file, "%ld %ld", &m->features, &m->classes) != 2) return 0;
    if (fgetc(file) != '\n' || m->features < 1 || m->classes < 1) return 0;
    size_t size = (size_t)(m->features + 1) * m->classes;
    m->weights = malloc(size * sizeof(float));
    if (!m->weights || fread(m->weights, sizeof(float), size, file) != size) return 0;
    fclose(file);
    return 1;
}

static void compute(const struct model *m) {
    for (long i = 0; i < n; i++)
        for (long c = 0; c < m->classes; c++) {
            float sum = m->weights[m->features * m->classes + c];
            for (long f = 0; f < m->features; f++)
                sum += images[i * m->features + f] * m->weights[f * m->classes + c];
            logits[i * m->classes + c] = sum;
        }
}

static struct model *chosen(long number) {
    if (number < 0 || number >= count) return fail("no such model"), NULL;
    if (models[number].features != features) return fail("the images are of another size"), NULL;
    logits = realloc(logits, n * models[number].classes * sizeof(float));
    return &models[number];
}

int main(int argc, char **argv) {
    static char line[8192];
    if (argc != 2 || strcmp(argv[1], "serve")) return 2;
    while (fgets(line, sizeof line, stdin)) {
        long a, b, c, d;
        int at = 0;
        struct model *m;
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "describe")) {
            printf("{\"runtime\": \"linear 1.0, float32\", \"machine\": \"" MACHINE "\"}\n");
        } else if (sscanf(line, "load %ld %n", &a, &at) == 1 && at) {
            long long start = now();
            if (count == 64 || !load(line + at)) fail("it is no model of mine");
            else printf("{\"model\": %d, \"load_ns\": %lld}\n", count++, now() - start);
        } else if (sscanf(line, "input %ld %ld %ld %ld", &a, &b, &c, &d) == 4) {
            n = a, features = b * c * d;
            images = realloc(images, n * features * sizeof(float));
            if (fread(images, sizeof(float), n * features, stdin) != (size_t)(n * features)) break;
            printf("{}\n");
        } else if (sscanf(line, "run %ld", &a) == 1) {
            if ((m = chosen(a))) {
                compute(m);
                long size = n * m->classes * sizeof(float);
                printf("{\"shape\": [%ld, %ld], \"bytes\": %ld}\n", n, m->classes, size);
                fwrite(logits, 1, size, stdout);
            }
        } else if (sscanf(line, "time %ld", &a) == 1) {
            if ((m = chosen(a))) {
                compute(m);
                long long start = now();
                compute(m);
                printf("{\"ns\": %lld}\n", now() - start);
            }
        } else if (!strcmp(line, "memory")) {
            struct rusage usage;
            getrusage(RUSAGE_SELF, &usage);
            printf("{\"peak_rss_bytes\": %lld}\n", usage.ru_maxrss * 1024LL);
        } else if (sscanf(line, "kernels %ld", &a) == 1) {
            printf("{\"kernels\": {\"float Linear\": 1}}\n");
        } else {
            fail("no such request");
        }
        fflush(stdout);
    }
    return 0;
}
