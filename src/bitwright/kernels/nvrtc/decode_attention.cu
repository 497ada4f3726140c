// Attention of one new token per sequence against its cache, "flash-decoding" (Dao et al., 2023): keys are cut among the
// blocks of a cluster and the warps of a block, each of which keeps a running maximum, weight and sum of values of its own.
//
// A warp takes runs of CHUNK keys and their values, which it brings to shared memory itself, and waits for no other. In the
// end it sends its sums to all blocks of the cluster, each of which adds up a part of the numbers, in the order of the
// keys. Keys of earlier tokens arrive before the wait for the launch that makes the queries.
//
// 8 lanes have a key: lane l of them numbers VECTOR * l and the next ones of each half of D, which the rotation pairs.
// Four keys at a time, then, one in each quarter of a warp; the quarters' sums are added at the end.
//
// Macros: D (64 or 128), HEADS of queries that share a head of keys, in TEAMS of warps that read the same keys (1 or 2),
// FRESH (1: the token's own key and value come with the query and are not in the cache yet), ROPE (0 or 1), FLOAT16 (0: bfloat16), SPLITS (blocks of a cluster), STAGES of a warp.
#include "half.cuh"
#include "ring.cuh"

constexpr int SLOTS = 4;                       // warps of a team
constexpr int CHUNK = 16, ROUNDS = CHUNK / 4;  // keys of a stage
constexpr int OWN = (HEADS + TEAMS - 1) / TEAMS;
constexpr int VECTOR = D / 16, NUMBERS = 2 * VECTOR;  // of a lane
constexpr int ROW = 2 * D, CHUNK_BYTES = CHUNK * ROW, STAGE_BYTES = 2 * CHUNK_BYTES;
constexpr int THREADS = 32 * SLOTS * TEAMS;
constexpr int PARTS = SLOTS * SPLITS;         // sums that are added up in the end
constexpr int SHARE = HEADS * D / SPLITS;     // numbers that a block adds up
constexpr int KEPT = NUMBERS / 4;             // numbers of a head that a lane sends
constexpr int SUM_BYTES = PARTS * SHARE * 4, STAT_BYTES = PARTS * HEADS * 8;
static_assert(SHARE % KEPT == 0, "what a lane sends goes to one block");
static_assert(D == 64 || D == 128, "");
static_assert(FRESH || !ROPE, "keys in the cache are turned, and so must queries be that come without their own");

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

struct Numbers {
    float v[NUMBERS];
};

// The 16-bit numbers of a lane, of a row in memory or in shared memory.
__device__ __forceinline__ Numbers unpacked(const u32 (&words)[VECTOR]) {
    Numbers r;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) r.v[2 * i] = number_of(words[i] & 0xffff), r.v[2 * i + 1] = number_of(words[i] >> 16);
    return r;
}

struct alignas(2 * VECTOR) Vector {
    u32 w[VECTOR / 2];
};

__device__ __forceinline__ Numbers read_row(const u16* row) {
    const Vector* own = (const Vector*)row + threadIdx.x % 8;
    const Vector low = own[0], high = own[8];
    u32 words[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++) words[i] = low.w[i], words[VECTOR / 2 + i] = high.w[i];
    return unpacked(words);
}

__device__ __forceinline__ Numbers read_shared_row(u32 row) {
    u32 words[VECTOR];
    const u32 first = row + 2 * VECTOR * (threadIdx.x % 8);
#if D == 128
    const Words4 low = read16(first), high = read16(first + D);
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = low.w[i], words[4 + i] = high.w[i];
#else
    const Words2 low = read8(first), high = read8(first + D);
#pragma unroll
    for (int i = 0; i < 2; i++) words[i] = low.w[i], words[2 + i] = high.w[i];
#endif
    return unpacked(words);
}

__device__ __forceinline__ void write_row(u16* row, const Numbers& x) {
    Vector* own = (Vector*)row + threadIdx.x % 8;
    Vector low, high;
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++) {
        low.w[i] = rounded(x.v[2 * i], x.v[2 * i + 1]);
        high.w[i] = rounded(x.v[VECTOR + 2 * i], x.v[VECTOR + 2 * i + 1]);
    }
    own[0] = low, own[8] = high;
}

// Pairs (i, i + D / 2), rounded as a model that rotates in a kernel of its own would.
__device__ __forceinline__ void rotate(Numbers& x, const float (&cosine)[VECTOR], const float (&sine)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const float first = x.v[i], second = x.v[VECTOR + i];
        x.v[i] = number_of(rounded(first * cosine[i] - second * sine[i]));
        x.v[VECTOR + i] = number_of(rounded(second * cosine[i] + first * sine[i]));
    }
}

__device__ __forceinline__ float product(const Numbers& a, const Numbers& b) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) sum += a.v[i] * b.v[i];
    return sum;
}

template <int first, int last>  // lanes whose numbers differ in these bits
__device__ __forceinline__ float sum_over_lanes(float v) {
#pragma unroll
    for (int d = first; d <= last; d *= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

struct Running {  // of one head
    float top, weight;
    Numbers sum;
};

// ---- bringing keys and values ----

struct Run {  // of keys, that a block has
    int begin, end;
    __device__ __forceinline__ int chunks(u32 slot) const {
        return (max(end - begin, 0) + CHUNK - 1 - (int)slot * CHUNK + (SLOTS - 1) * CHUNK) / (SLOTS * CHUNK);
    }
    __device__ __forceinline__ int first(u32 slot, int chunk) const { return begin + ((int)slot + chunk * SLOTS) * CHUNK; }
};

__device__ __forceinline__ void bring_chunk(const u16* keys, const u16* values, const Run& run, u32 slot, int chunk,
                                            u32 stage, u32 full) {
    const int first = run.first(slot, chunk);
    const u32 bytes = min(CHUNK, run.end - first) * ROW;
    barrier_expect(full, 2 * bytes);
    bring_run(stage, keys + (u64)first * D, bytes, full);
    bring_run(stage + CHUNK_BYTES, values + (u64)first * D, bytes, full);
}

// ---- counting ----

// Keys `first` on of a stage, those before `end`, of which there is at least one.
__device__ __forceinline__ void count(Running (&heads)[OWN], const Numbers (&query)[OWN], u32 stage, int first, int end,
                                      float scale_log2) {
    const int quarter = threadIdx.x % 32 / 8;
    float score[ROUNDS][OWN];
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const Numbers key = read_shared_row(stage + (4 * i + quarter) * ROW);
#pragma unroll
        for (int h = 0; h < OWN; h++) {
            const float all = sum_over_lanes<1, 4>(product(query[h], key));
            score[i][h] = first + 4 * i + quarter < end ? all * scale_log2 : minus_infinity();
        }
    }
#pragma unroll
    for (int h = 0; h < OWN; h++) {
        Running& r = heads[h];
        float top = r.top;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) top = fmaxf(top, score[i][h]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 8));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 16));
        const float fade = power_of_two(r.top - top);
        r.top = top, r.weight *= fade;
#pragma unroll
        for (int i = 0; i < NUMBERS; i++) r.sum.v[i] *= fade;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            score[i][h] = power_of_two(score[i][h] - top);
            r.weight += score[i][h];
        }
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        if (first + 4 * i + quarter >= end) continue;  // whatever stands there, a NaN maybe
        const Numbers value = read_shared_row(stage + CHUNK_BYTES + (4 * i + quarter) * ROW);
#pragma unroll
        for (int h = 0; h < OWN; h++)
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) heads[h].sum.v[j] += score[i][h] * value.v[j];
    }
}

// Sums of the four quarters of a warp: a lane keeps a quarter of its numbers, from `kept_at` on.
__device__ __forceinline__ void gather(float (&kept)[KEPT], const Numbers& sum) {
    const bool second = threadIdx.x & 16, fourth = threadIdx.x & 8;
    float half[NUMBERS / 2];
#pragma unroll
    for (int i = 0; i < NUMBERS / 2; i++) {
        const float low = sum.v[i], high = sum.v[NUMBERS / 2 + i];
        half[i] = (second ? high : low) + __shfl_xor_sync(0xffffffffu, second ? low : high, 16);
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const float low = half[i], high = half[KEPT + i];
        kept[i] = (fourth ? high : low) + __shfl_xor_sync(0xffffffffu, fourth ? low : high, 8);
    }
}

__device__ __forceinline__ int kept_at() {
    const int lane = threadIdx.x % 32;
    return lane / 16 * (D / 2) + lane % 8 * VECTOR + lane / 8 % 2 * KEPT;
}

// ---- the kernel ----

// qkv [B, (HEADS + 2) KV, D], as one row of queries, keys and values a sequence (queries alone without FRESH); keys, values
// [B, KV, S, D], the first positions[b] of sequence b filled; cosine, sine [S, D / 2]; out [B, HEADS KV, D]. Clusters: one
// a sequence and head of keys.
extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(THREADS)
    decode_attention(const u16* qkv, const float* cosine, const float* sine, const int* positions, u16* keys, u16* values,
                     u16* out, float scale_log2, int KV, int S) {
    extern __shared__ unsigned char memory[];
    allow_launch();
    const u32 stages = (shared_address(memory) + 127) & ~127u;
    const u32 sums = stages + SLOTS * STAGES * STAGE_BYTES, stats = sums + SUM_BYTES;  // that were sent, by parts
    const u32 sent = stats + STAT_BYTES, full = sent + 8, empty = full + 8 * SLOTS * STAGES;
    const u32 rank = SPLITS == 1 ? 0 : cluster_rank(), warp = warp_number(), slot = warp % SLOTS, team = warp / SLOTS;
    const u32 own_stages = stages + slot * STAGES * STAGE_BYTES, own_full = full + 8 * slot * STAGES;
    const u32 own_empty = empty + 8 * slot * STAGES;
    const int pair = blockIdx.x / SPLITS, sequence = pair / KV, head = pair % KV;
    const int position = positions[sequence], old = min(position, S);
    const int stretch = ((old + CHUNK - 1) / CHUNK + SPLITS - 1) / SPLITS * CHUNK;
    const Run run = {(int)rank * stretch, min((int)(rank + 1) * stretch, old)};
    const int chunks = run.chunks(slot);
    u16 *own_keys = keys + (u64)pair * S * D, *own_values = values + (u64)pair * S * D;
    if (team == 0 && elected()) {
        for (int s = 0; s < STAGES; s++) barrier_init(own_full + 8 * s, 1), barrier_init(own_empty + 8 * s, TEAMS);
        if (slot == 0) barrier_init(sent, 1);
        barriers_ready();
        if (slot == 0) barrier_expect(sent, SUM_BYTES + STAT_BYTES);
        for (int c = 0; c < min(chunks, STAGES); c++)
            bring_chunk(own_keys, own_values, run, slot, c, own_stages + c * STAGE_BYTES, own_full + 8 * c);
    }
    // What others wait for or send to must be there before; they wait for this much later.
    cluster_arrive_barriers();
    float turn_cosine[VECTOR], turn_sine[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const u64 at = (u64)min(position, S - 1) * (D / 2) + VECTOR * (threadIdx.x % 8) + i;
        turn_cosine[i] = ROPE ? cosine[at] : 1.0f, turn_sine[i] = ROPE ? sine[at] : 0.0f;
    }
    cluster_wait();

    wait_for_launches();
    const u16* row = qkv + (u64)sequence * (HEADS + 2 * FRESH) * KV * D;
    Numbers query[OWN];
    Running heads[OWN];
#pragma unroll
    for (int h = 0; h < OWN; h++) {
        const int which = min((int)team * OWN + h, HEADS - 1);  // a team may have fewer: it does one twice
        query[h] = read_row(row + (head * HEADS + which) * D);
        if (ROPE) rotate(query[h], turn_cosine, turn_sine);
        heads[h] = {minus_infinity(), 0.0f, {}};
    }
    if (FRESH && rank == 0 && slot == 0 && position < S) {  // where the cache is full, the new key has no place and does not count
        Numbers key = read_row(row + (HEADS * KV + head) * D);
        const Numbers value = read_row(row + (HEADS * KV + KV + head) * D);
        if (ROPE) rotate(key, turn_cosine, turn_sine);
        const bool first = threadIdx.x % 32 < 8;
        if (team == 0 && first) write_row(own_keys + (u64)position * D, key), write_row(own_values + (u64)position * D, value);
#pragma unroll
        for (int h = 0; h < OWN; h++) {
            heads[h].top = sum_over_lanes<1, 4>(product(query[h], key)) * scale_log2;
            if (first) heads[h].weight = 1.0f, heads[h].sum = value;
        }
    }
    Ring ring;
    for (int c = 0; c < chunks; c++, ring.next()) {
        const u32 stage = own_stages + ring.stage * STAGE_BYTES;
        barrier_wait(own_full + 8 * ring.stage, ring.parity);
        count(heads, query, stage, run.first(slot, c), run.end, scale_log2);
        if (c + STAGES >= chunks) continue;
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(own_empty + 8 * ring.stage);
        if (team == 0 && elected()) {
            barrier_wait(own_empty + 8 * ring.stage, ring.parity);
            bring_chunk(own_keys, own_values, run, slot, c + STAGES, stage, own_full + 8 * ring.stage);
        }
        __syncwarp();
    }

    // What all have counted, together.
    const u32 part = rank * SLOTS + slot, lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < OWN; h++) {
        const int which = (int)team * OWN + h;
        float kept[KEPT];
        gather(kept, heads[h].sum);
        const float weight = sum_over_lanes<8, 16>(heads[h].weight);
        if (which >= HEADS) continue;
        const u32 number = which * D + kept_at(), to = number / SHARE, at = sums + 4 * (part * SHARE + number % SHARE);
#if D == 128
        send16(at, kept[0], kept[1], kept[2], kept[3], sent, to);
#else
        send8(at, kept[0], kept[1], sent, to);
#endif
        if (lane < SPLITS) send8(stats + 8 * (part * HEADS + which), heads[h].top, weight, sent, lane);
    }
    barrier_wait(sent, 0);
    for (u32 i = threadIdx.x; i < SHARE; i += THREADS) {
        const u32 number = rank * SHARE + i, which = number / D;
        Words2 stat[PARTS];
        float most = minus_infinity(), weight = 0.0f, sum = 0.0f;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            stat[p] = read8(stats + 8 * (p * HEADS + which));
            most = fmaxf(most, __uint_as_float(stat[p].w[0]));
        }
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const float share = power_of_two(__uint_as_float(stat[p].w[0]) - most);
            weight += share * __uint_as_float(stat[p].w[1]);
            sum += share * __uint_as_float(read4(sums + 4 * (p * SHARE + i)));
        }
        out[(u64)(sequence * KV + head) * HEADS * D + number] = rounded(sum / weight);
    }
}
