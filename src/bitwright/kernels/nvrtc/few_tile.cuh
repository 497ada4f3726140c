// Tiles and stages of `few_tokens.cu`.
#pragma once
#include "codes.cuh"
#include "mma.cuh"
#include "ring.cuh"

constexpr int STEP = 64 * COLUMNS, TEAM = WARPS / TEAMS, ROWS = 16 * TEAM, BANDS = ROWS / 64;
constexpr int SHARE = COLUMNS / TEAMS;  // column blocks of a step that a team takes
constexpr int GROUPS = GROUP == 0 || GROUP >= STEP ? 1 : STEP / GROUP, WIDTH = STEP / GROUPS;
constexpr int EIGHTS = TOKENS / 8;
constexpr int TOKEN_BYTES = COLUMNS * TOKENS * 128;  // 64 columns of all tokens, then the next 64
constexpr int BAND_BYTES = 4 * BLOCK_BYTES, SECOND_BAND_BYTES = 4 * SECOND_BYTES;  // of one column block
constexpr int WORD_BYTES = BANDS * COLUMNS * BAND_BYTES, SECOND_WORD_BYTES = BANDS * COLUMNS * SECOND_BAND_BYTES;
constexpr int SCALE_BYTES = GROUPS * ROWS * 2;
constexpr int SECOND_AT = TOKEN_BYTES + WORD_BYTES, SCALE_AT = SECOND_AT + SECOND_WORD_BYTES;
constexpr int ZERO_AT = SCALE_AT + SCALE_BYTES;
constexpr int STAGE_BYTES = (ZERO_AT + (ASYM ? SCALE_BYTES : 0) + 1023) / 1024 * 1024;
constexpr int SUMS = 4 * EIGHTS;  // of a thread, four for 8 tokens
static_assert(ROWS % 64 == 0 && ROWS <= 256 && (GROUP < STEP ? WIDTH * GROUPS == STEP : GROUP % STEP == 0), "");
static_assert(COLUMNS % TEAMS == 0 && TEAMS <= 2, "every team takes whole column blocks; the first adds up the other's sums");
static_assert(64 * SHARE % WIDTH == 0 || WIDTH % (64 * SHARE) == 0, "");
constexpr int GIVEN_BYTES = TEAMS > 1 ? 2 * (TEAMS - 1) * ROWS * TOKENS * 4 : 0;  // sums that teams hand over

struct Problem {
    int M, N, bands, columns, groups;  // bands and column blocks of a weight, rows of its scales
    int tiles, steps, per;             // tiles along N, steps of a tile, steps of a run
};
