// Where the tokens of a lane lie: runs of neighbouring pages in a pool.
#pragma once

#include <cstdint>

namespace kvote {

constexpr std::int64_t PAGE = 64;
// Tokens in a page of packed keys or values; whole groups of up to as many.
constexpr std::int64_t PACKED = 128;

struct Run {
    std::int64_t first, pages;
};

// Its functions are compiled for several instruction sets, so they must never exist as one shared copy.
#define KVOTE_INLINE inline __attribute__((always_inline))

struct Lane {
    const Run* runs;
    std::int64_t count;

    // Pool slot (page * PAGE + offset) of a token; `from` remembers the run of the last call for ascending tokens.
    struct Cursor {
        std::int64_t run = 0, start = 0;
    };

    KVOTE_INLINE std::int64_t slot(std::int64_t token, Cursor& at) const {
        if (token < at.start) at = Cursor{};
        while (at.run + 1 < count && token >= at.start + runs[at.run].pages * PAGE) {
            at.start += runs[at.run].pages * PAGE;
            ++at.run;
        }
        return runs[at.run].first * PAGE + (token - at.start);
    }

    // How many tokens from `token` on lie behind each other.
    KVOTE_INLINE std::int64_t stretch(std::int64_t token, Cursor& at) const {
        slot(token, at);
        return at.run + 1 < count ? at.start + runs[at.run].pages * PAGE - token : INT64_MAX;
    }
};

}  // namespace kvote
