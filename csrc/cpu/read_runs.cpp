// Rows of a table in any order: thousands of short reads, without Python and its lock between them.
#include <unistd.h>

#include <cerrno>

#include "../seme.h"

namespace seme {

void read_runs(int file, int64_t n, const int64_t* offsets, const int64_t* places, const int64_t* sizes, char* to) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t done = 0; done < sizes[i];) {
            const ssize_t got = pread(file, to + places[i] + done, size_t(sizes[i] - done), off_t(offsets[i] + done));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) throw ReadError{i, got < 0 ? errno : 0};
            done += got;
        }
    }
}

}  // namespace seme
