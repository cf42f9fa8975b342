/* The gated delta rule in C, forward and backward, tested with the conformance kit:

       cc -O2 -o delta_rule delta_rule.c -lm
       deltanet-ref check --exec "./delta_rule {in} {out}"

   It reads a case (a safetensors file: q k v g beta S0 do dS_end in float32, scale in float64), loops over the tokens
   and writes o, S_end and the six gradients. Replace `forward` and `backward` with calls to your kernel. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { const char *name; int axes; long size[4]; float *at; } Tensor;

static void fail(const char *what, const char *name) { fprintf(stderr, "%s: %s\n", what, name); exit(1); }

static void *zeros(long n) {
    void *p = calloc(n ? n : 1, 1);
    if (!p) fail("out of memory", "");
    return p;
}

static Tensor make(const char *name, int axes, const long *size) {
    Tensor t = {name, axes, {1, 1, 1, 1}, NULL};
    long n = 1;
    for (int i = 0; i < axes; i++) n *= t.size[i] = size[i];
    t.at = zeros(n * sizeof(float));
    return t;
}

static long count(const Tensor *t) { return t->size[0] * t->size[1] * t->size[2] * t->size[3]; }

/* ---- safetensors: length (u64), then JSON {"name":{"dtype":..,"shape":[..],"data_offsets":[a,b]},..}, then data */

static char *read_file(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) fail("cannot read", path);
    fseek(f, 0, SEEK_END);
    long n = ftell(f);
    rewind(f);
    char *bytes = zeros(n + 1);
    if (fread(bytes, 1, n, f) != (size_t)n) fail("cannot read", path);
    fclose(f);
    return bytes;
}

static Tensor get(const char *file, const char *name) {
    uint64_t length;
    memcpy(&length, file, 8);
    char key[64];
    snprintf(key, sizeof key, "\"%s\":{", name);
    const char *entry = strstr(file + 8, key);
    if (!entry) fail("the case has no", name);
    const char *shape = strchr(strstr(entry, "\"shape\""), '[') + 1;
    const char *offsets = strchr(strstr(entry, "\"data_offsets\""), '[') + 1;
    long size[4] = {1, 1, 1, 1}, axes = 0;
    for (char *end; *shape != ']' && axes < 4; shape = *end == ',' ? end + 1 : end)
        size[axes++] = strtol(shape, &end, 10);
    Tensor t = make(name, (int)axes, size);
    const char *data = file + 8 + length + strtol(offsets, NULL, 10);
    if (strstr(entry, "\"F64\"") && strstr(entry, "\"F64\"") < strchr(entry, '}')) {
        double x;
        memcpy(&x, data, 8);                                   /* only scale is float64 */
        t.at[0] = (float)x;
    } else {
        memcpy(t.at, data, count(&t) * sizeof(float));
    }
    return t;
}

static void write_file(const char *path, Tensor *tensors, int n) {
    char header[4096];
    long used = sprintf(header, "{"), offset = 0;
    for (int i = 0; i < n; i++) {
        Tensor *t = &tensors[i];
        used += sprintf(header + used, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[", i ? "," : "", t->name);
        for (int a = 0; a < t->axes; a++) used += sprintf(header + used, a ? ",%ld" : "%ld", t->size[a]);
        used += sprintf(header + used, "],\"data_offsets\":[%ld,%ld]}", offset, offset + 4 * count(t));
        offset += 4 * count(t);
    }
    used += sprintf(header + used, "}");
    while (used % 8) header[used++] = ' ';
    FILE *f = fopen(path, "wb");
    if (!f) fail("cannot write", path);
    uint64_t length = used;
    fwrite(&length, 8, 1, f);
    fwrite(header, 1, used, f);
    for (int i = 0; i < n; i++) fwrite(tensors[i].at, 4, count(&tensors[i]), f);
    if (fclose(f)) fail("cannot write", path);
}

/* ---- the rule, one value head of one batch row; S is (d_k, d_v), rows of v are H_v d_v apart */

typedef struct { long L, H_k, H_v, dk, dv; float scale; } Sizes;

static void forward(Sizes s, const float *q, const float *k, const float *v, const float *g, const float *beta,
                    float *S, float *o, float *states, float *errors) {
    for (long t = 0; t < s.L; t++, q += s.H_k * s.dk, k += s.H_k * s.dk, v += s.H_v * s.dv, o += s.H_v * s.dv) {
        float decay = expf(g[t * s.H_v]), b = beta[t * s.H_v], *error = errors + t * s.dv;
        for (long i = 0; i < s.dk * s.dv; i++) states[t * s.dk * s.dv + i] = S[i] *= decay;      /* S = exp(g) S */
        for (long j = 0; j < s.dv; j++) {
            error[j] = v[j];                                                                     /* error = v - k S */
            for (long i = 0; i < s.dk; i++) error[j] -= k[i] * S[i * s.dv + j];
        }
        for (long i = 0; i < s.dk; i++)
            for (long j = 0; j < s.dv; j++) S[i * s.dv + j] += k[i] * b * error[j];          /* S = S + k beta error */
        for (long j = 0; j < s.dv; j++) {
            o[j] = 0;                                                                            /* o = scale q S */
            for (long i = 0; i < s.dk; i++) o[j] += s.scale * q[i] * S[i * s.dv + j];
        }
    }
}

/* states: S after the decay, before the write. dS is dS_end on entry and dS0 on return; dq and dk are accumulated. */
static void backward(Sizes s, const float *q, const float *k, const float *g, const float *beta, const float *states,
                     const float *errors, const float *d_o, float *dS, float *dq, float *dk, float *dv, float *dg,
                     float *dbeta) {
    for (long t = s.L - 1; t >= 0; t--) {
        const float *S = states + t * s.dk * s.dv, *error = errors + t * s.dv;
        const float *Q = q + t * s.H_k * s.dk, *K = k + t * s.H_k * s.dk, *dO = d_o + t * s.H_v * s.dv;
        float *dQ = dq + t * s.H_k * s.dk, *dK = dk + t * s.H_k * s.dk, *dV = dv + t * s.H_v * s.dv;
        float decay = expf(g[t * s.H_v]), b = beta[t * s.H_v], db = 0, dlog = 0;
        for (long i = 0; i < s.dk; i++)
            for (long j = 0; j < s.dv; j++) {                                    /* o = scale q (S + k beta error) */
                dQ[i] += s.scale * dO[j] * (S[i * s.dv + j] + K[i] * b * error[j]);
                dS[i * s.dv + j] += s.scale * Q[i] * dO[j];
            }
        for (long j = 0; j < s.dv; j++) {
            float du = 0;                                                        /* S = S + k u, u = beta error */
            for (long i = 0; i < s.dk; i++) du += K[i] * dS[i * s.dv + j];
            db += du * error[j];
            dV[j] = b * du;                                                      /* error = v - k S */
        }
        for (long i = 0; i < s.dk; i++)
            for (long j = 0; j < s.dv; j++) {
                dK[i] += b * error[j] * dS[i * s.dv + j] - dV[j] * S[i * s.dv + j];
                dS[i * s.dv + j] -= K[i] * dV[j];
                dlog += dS[i * s.dv + j] * S[i * s.dv + j];                      /* S = exp(g) S */
                dS[i * s.dv + j] *= decay;
            }
        dg[t * s.H_v] = dlog;
        dbeta[t * s.H_v] = db;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) fail("usage", "delta_rule IN.safetensors OUT.safetensors");
    char *file = read_file(argv[1]);
    Tensor q = get(file, "q"), k = get(file, "k"), v = get(file, "v"), g = get(file, "g"), beta = get(file, "beta"),
           S0 = get(file, "S0"), d_o = get(file, "do"), dS_end = get(file, "dS_end");
    Sizes s = {q.size[1], q.size[2], v.size[2], q.size[3], v.size[3], get(file, "scale").at[0]};
    Tensor out[] = {make("o", 4, v.size), make("S_end", 4, S0.size), make("dq", 4, q.size), make("dk", 4, k.size),
                    make("dv", 4, v.size), make("dg", 3, g.size), make("dbeta", 3, beta.size), make("dS0", 4, S0.size)};
    float *states = zeros(s.L * s.dk * s.dv * sizeof(float)), *errors = zeros(s.L * s.dv * sizeof(float));
    memcpy(out[1].at, S0.at, count(&S0) * sizeof(float));
    memcpy(out[7].at, dS_end.at, count(&dS_end) * sizeof(float));
    for (long n = 0; n < q.size[0]; n++)
        for (long h = 0; h < s.H_v; h++) {
            long key = (n * s.L * s.H_k + h / (s.H_v / s.H_k)) * s.dk;           /* its key head: grouped order */
            long value = (n * s.L * s.H_v + h) * s.dv, gate = n * s.L * s.H_v + h;
            long state = (n * s.H_v + h) * s.dk * s.dv;
            forward(s, q.at + key, k.at + key, v.at + value, g.at + gate, beta.at + gate, out[1].at + state,
                    out[0].at + value, states, errors);
            backward(s, q.at + key, k.at + key, g.at + gate, beta.at + gate, states, errors, d_o.at + value,
                     out[7].at + state, out[2].at + key, out[3].at + key, out[4].at + value, out[5].at + gate,
                     out[6].at + gate);
        }
    write_file(argv[2], out, 8);
    return 0;
}
