// Tables of 16-bit partial sums and what they add up to: all that the kernels with tables in
// registers have in common. Included once by each of them (kernel_*.h), which defines before
//
//   VQLOGITS_PATH    its namespace, which holds
//     S                         the shape of its look-ups (layout.h)
//     kRows, kPairBlocks, kSingleBlocks   rows that share a load of codes, and blocks that share one
//                               of tables where two rows or one are left
//     FieldScores               the scores of a field of sign codes
//     add_segment, sign_sums, put_entries, store_half, store_bfloat16
//   VQLOGITS_TARGET  the attribute of functions that need its instructions
//
// Precision. Entries are 16-bit integers; each row and segment has a scale of its own, and the
// middle of each table goes into the row's offset. 16-bit sums are modulo 2^16, so no partial sum
// need fit, only the sum of a whole segment: with b the sum over its F tables of half their range,
// scale = b / (32700 - F / 2) is enough for every code there can be. A look-up is off by at most
// scale / 2, a logit by at most the sum over segments of F * scale / 2. With fields of 5 bits,
// segments of 9, 17, 34 and all 67 words of three leave, at R = 1,000 and normal scores, an error of
// 0.04, 0.08, 0.16 and 0.32% of the logits' standard deviation (the largest of 50,257 tokens and 24
// rows: 0.2, 0.4, 0.8, 1.5%), and 24 rows take 5.6, 5.2, 5.0 and 5.0 ms on one core.

namespace vqlogits::VQLOGITS_PATH {

// Rows whose tables are built before they are used: at R = 1,000 these are 0.8 MB.
constexpr int64_t kBatchRows = 64;
// Scores that a task makes: with d = 768 in float32 it reads 48 KB of the codebook.
constexpr int64_t kScoresOfTask = 16;

// The tables of a batch of rows.
class Tables {
 public:
  Tables(const Fields<S>& fields, int64_t rows)
      : scales(rows * fields.segments),
        offsets(rows * fields.segments),
        storage_(rows * fields.row_entries() + 32) {
    // A table fills a cache line or half of one; across two of them every look-up would load twice.
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    entries = storage_.data() + (-address % 64) / sizeof(int16_t);
  }

  int16_t* entries;            // [rows][fields][as put_entries stores them]
  std::vector<float> scales;   // [rows][segments]
  std::vector<float> offsets;  // [rows][segments]

 private:
  std::vector<int16_t> storage_;
};

inline FieldScores scores_of(const Coding& coding, const float* scores, int64_t field) {
  FieldScores found = {};  // codebooks that only fill the last field add nothing
  for (int i = 0; i < S::kFieldBits && field * S::kFieldBits + i < coding.codebooks; i++) {
    found.of[i] = scores[field * S::kFieldBits + i];
  }
  return found;
}

// The partial sums of a field of index codes, less the middle of their range; returns half the
// range.
VQLOGITS_TARGET inline float index_sums(const Coding& coding, const Fields<S>& fields,
                                        const float* scores, int64_t field, float* sums,
                                        float* middle) {
  const int codewords = 1 << fields.index_bits;
  int size = 1;
  sums[0] = 0.0f;
  for (int index = 0; index < fields.indices; index++) {
    const int64_t g = field * fields.indices + index;
    if (g >= coding.codebooks) break;
    for (int k = codewords - 1; k >= 0; k--) {  // downwards: k = 0 overwrites what the others read
      // No code holds an index of K or more; any score serves that widens no range.
      const float score = scores[g * coding.codewords + std::min<int64_t>(k, coding.codewords - 1)];
      for (int i = 0; i < size; i++) sums[k * size + i] = sums[i] + score;
    }
    size *= codewords;
  }
  for (int i = size; i < S::kEntries; i++) sums[i] = sums[0];  // never looked up
  float low = sums[0], high = sums[0];
  for (int i = 1; i < S::kEntries; i++) {
    low = std::min(low, sums[i]);
    high = std::max(high, sums[i]);
  }
  *middle = 0.5f * low + 0.5f * high;
  for (int i = 0; i < S::kEntries; i++) sums[i] -= *middle;
  return 0.5f * high - 0.5f * low;
}

// Whether no score is NaN or infinite. These have all bits of the exponent set, and integers are
// compared many at a time.
VQLOGITS_TARGET inline bool all_finite(const float* scores, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, scores + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest < 0x7f800000u;
}

// Tables, scale and offset of one row of scores and one segment. With a score that is not finite
// the offset is NaN, and so the whole row will be: which tokens it concerns, integers cannot say.
VQLOGITS_TARGET inline void build(const Coding& coding, const Fields<S>& fields, const float* scores,
                                  int64_t segment, int16_t* entries, float* scale, float* offset) {
  float sums[S::kMaxSegmentFields][S::kEntries];
  const int64_t first = fields.segment_begin(segment) * S::kFieldsPerWord;
  const int64_t count = fields.segment_end(segment) * S::kFieldsPerWord - first;
  double bound = 0.0, middles = 0.0;
  for (int64_t f = 0; f < count; f++) {
    float middle = 0.0f;
    bound += coding.sign ? sign_sums(scores_of(coding, scores, first + f), sums[f])
                         : index_sums(coding, fields, scores, first + f, sums[f], &middle);
    middles += middle;
  }
  // Scores that are all zero, or too small for a normal scale, give entries of zero and no NaN.
  *scale = std::max(static_cast<float>(bound / (32700.0 - 0.5 * count)), FLT_MIN);
  for (int64_t f = 0; f < count; f++) {
    put_entries(sums[f], 1.0f / *scale, entries + (first + f) * S::kEntries);
  }
  const int64_t per_field =
      coding.sign ? S::kFieldBits : int64_t{fields.indices} * coding.codewords;
  const int64_t begin = std::min(first * per_field, coding.scores_per_row());
  const int64_t end = std::min((first + count) * per_field, coding.scores_per_row());
  const bool finite = all_finite(scores + begin, end - begin);
  *offset = finite ? static_cast<float>(middles) : std::numeric_limits<float>::quiet_NaN();
}

// out[at, at + count) = logits in the type asked for, rounded to nearest even. Up to 15 logits
// behind the last one are read.
VQLOGITS_TARGET inline void store(const float* logits, int64_t count, Type type, void* out,
                                  int64_t at) {
  if (type == Type::kFloat32) {
    std::memcpy(static_cast<float*>(out) + at, logits, count * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + at;
  for (int64_t v = 0; v < count; v += 16) {
    uint16_t last[16];
    uint16_t* halves = v + 16 <= count ? to + v : last;
    if (type == Type::kFloat16) {
      store_half(logits + v, halves);
    } else {
      store_bfloat16(logits + v, halves);
    }
    if (halves == last) std::memcpy(to + v, last, (count - v) * sizeof(uint16_t));
  }
}

// partial[row][token] += what the tables of ROWS rows, the first of them `row`, add up to for `used`
// of `blocks` blocks of tiled codes.
template <int ROWS, int BLOCKS>
VQLOGITS_TARGET inline void add_blocks(const Fields<S>& fields, const S::Word* tiles, int64_t blocks,
                                       int64_t used, const Tables& tables, int64_t row,
                                       float* partial) {
  for (int64_t segment = 0; segment < fields.segments; segment++) {
    const int64_t begin = fields.segment_begin(segment);
    const int64_t words = fields.segment_end(segment) - begin;
    const S::Word* codes = tiles + begin * blocks * kLanes;
    for (int64_t block = 0; block < used; block += BLOCKS) {
      add_segment<ROWS, BLOCKS>(
          codes + block * words * kLanes, words,
          tables.entries + row * fields.row_entries() + begin * S::kFieldsPerWord * S::kEntries,
          fields.row_entries(), tables.scales.data() + row * fields.segments + segment,
          fields.segments, partial + block * kLanes);
    }
  }
}

// The same for the tokens of a task that have second codes, times their factor.
template <int ROWS>
VQLOGITS_TARGET inline void add_fine(const Fields<S>& fields, const Fine& fine, const Tables& tables,
                                     int64_t row, int64_t task, float* partial) {
  const int64_t begin = fine.begins[task], count = fine.begins[task + 1] - begin;
  const int64_t blocks = fine.blocks[task + 1] - fine.blocks[task];
  alignas(64) float sums[ROWS * kTaskTokens];
  for (int n = 0; n < ROWS; n++) std::fill_n(sums + n * kTaskTokens, blocks * kLanes, 0.0f);
  add_blocks<ROWS, 1>(
      fields,
      static_cast<const S::Word*>(fine.tiles) + fine.blocks[task] * kLanes * fields.words, blocks,
      blocks, tables, row, sums);
  for (int n = 0; n < ROWS; n++) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t token = fine.ids[begin + i] - task * kTaskTokens;
      partial[n * kTaskTokens + token] += fine.factor * sums[n * kTaskTokens + i];
    }
  }
}

// What becomes of the logits of a task.
struct Store {
  Type type;
  void* out;  // [N, V]
  int64_t vocabulary;
  VQLOGITS_TARGET void operator()(int64_t row, int64_t first, int64_t count,
                                  const float* logits) const {
    store(logits, count, type, out, row * vocabulary + first);
  }
};

// Logits of ROWS rows, the first of them `row`, for the tokens of one task.
template <int ROWS, int BLOCKS>
VQLOGITS_TARGET inline void expand_task(const Coding& coding, const Fields<S>& fields,
                                        const S::Word* tiles, const Fine* fine, const Tables& tables,
                                        int64_t row, int64_t task, const Store& store) {
  alignas(64) float partial[ROWS * kTaskTokens];
  for (int n = 0; n < ROWS; n++) {
    const float* offsets = tables.offsets.data() + (row + n) * fields.segments;
    std::fill_n(partial + n * kTaskTokens, kTaskTokens,
                std::accumulate(offsets, offsets + fields.segments, 0.0f));
  }
  const int64_t first = task * kTaskTokens;
  const int64_t count = std::min(kTaskTokens, coding.vocabulary - first);
  const int64_t used = (count + kLanes * BLOCKS - 1) / (kLanes * BLOCKS) * BLOCKS;
  add_blocks<ROWS, BLOCKS>(fields, tiles + first * fields.words, kBlocks, used, tables, row,
                           partial);
  if (fine) add_fine<ROWS>(fields, *fine, tables, row, task, partial);
  for (int n = 0; n < ROWS; n++) store(row + n, first, count, partial + n * kTaskTokens);
}

// Scores [begin, end) of all rows.
template <typename T>
VQLOGITS_TARGET inline void score(const Scoring& scoring, int64_t rows, int64_t per_row,
                                  int64_t begin, int64_t end, float* scores) {
  const auto* codebook = static_cast<const T*>(scoring.codebook);
  const auto* bias = static_cast<const T*>(scoring.bias);
  for (int64_t r = begin; r < end; r++) {
    for (int64_t n = 0; n < rows; n++) {
      const float product = dot(scoring.hidden + n * scoring.size, codebook + r * scoring.size,
                                scoring.size);
      scores[n * per_row + r] = scoring.scale * (product + to_float(bias[r]));
    }
  }
}

// Logits of up to kBatchRows rows. With a scoring their scores are made first, else they are given.
inline void expand_batch(const Coding& coding, const Fields<S>& fields, const Scoring* scoring,
                         float* scores, const void* tiles, const Fine* fine, int64_t rows,
                         const Store& store, int threads, Tables& tables) {
  const auto* words = static_cast<const S::Word*>(tiles);
  const int64_t per_row = coding.scores_per_row();
  const auto make_scores = [&](int64_t task) {
    const int64_t begin = task * kScoresOfTask, end = std::min(begin + kScoresOfTask, per_row);
    with_type(scoring->type, [&](auto* of) {
      using T = std::remove_pointer_t<decltype(of)>;
      score<T>(*scoring, rows, per_row, begin, end, scores);
    });
  };
  const auto make_tables = [&](int64_t task) {
    const int64_t row = task / fields.segments, segment = task % fields.segments;
    build(coding, fields, scores + row * per_row, segment,
          tables.entries + row * fields.row_entries(), &tables.scales[task], &tables.offsets[task]);
  };
  const auto make_logits = [&](int64_t task) {
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      expand_task<kRows, 1>(coding, fields, words, fine, tables, row, task, store);
    }
    if constexpr (kRows > 2) {
      for (; row + 2 <= rows; row += 2) {
        expand_task<2, kPairBlocks>(coding, fields, words, fine, tables, row, task, store);
      }
    }
    for (; row < rows; row++) {
      expand_task<1, kSingleBlocks>(coding, fields, words, fine, tables, row, task, store);
    }
  };
  Phase scored(scoring ? (per_row + kScoresOfTask - 1) / kScoresOfTask : 0, make_scores);
  Phase tabled(rows * fields.segments, make_tables);
  Phase expanded(fields.tasks, make_logits);
  parallel_phases(threads, scored, tabled, expanded);
}

// What the interface calls (expand.cpp).
struct Kernel {
  // scores [N, ...] float32, codes as tiles, second codes or null -> out [N, V] of the given type.
  static void expand(const Coding& coding, const float* scores, const void* tiles, const Fine* fine,
                     int64_t rows, Type type, void* out, int threads) {
    const Fields<S> fields(coding);
    const int64_t row_bytes = coding.vocabulary * (type == Type::kFloat32 ? 4 : 2);
    Tables tables(fields, std::min(rows, kBatchRows));
    for (int64_t first = 0; first < rows; first += kBatchRows) {
      const Store store{type, static_cast<char*>(out) + first * row_bytes, coding.vocabulary};
      expand_batch(coding, fields, nullptr,
                   const_cast<float*>(scores) + first * coding.scores_per_row(), tiles, fine,
                   std::min(kBatchRows, rows - first), store, threads, tables);
    }
  }

  // Hidden states of up to kBatchRows rows -> out [N, V] of the given type.
  static void logits(const Coding& coding, const Scoring& scoring, const void* tiles, const Fine* fine,
                     int64_t rows, Type type, void* out, int threads) {
    const Fields<S> fields(coding);
    Tables tables(fields, rows);
    std::vector<float> scores(rows * coding.scores_per_row());
    const Store store{type, out, coding.vocabulary};
    expand_batch(coding, fields, &scoring, scores.data(), tiles, fine, rows, store, threads, tables);
  }
};

}  // namespace vqlogits::VQLOGITS_PATH
