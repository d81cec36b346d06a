// Three names that headers of new systems use, defined here, so that the library also loads on older systems: with glibc
// from 2.16 on and the libstdc++ of GCC 5 on. A static libstdc++ is no way there. It takes newer names of glibc, and its
// exceptions would not be the ones that PyTorch catches. `local.map` keeps these names out of other libraries.
#include <new>
#include <sstream>

extern "C" {
// glibc 2.32 has it. 0: there may be other threads, so that counts of references are atomic.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#ifdef __GLIBCXX__
namespace std {
// GCC 11 has it, for a vector that is longer than any may be.
[[noreturn]] void __throw_bad_array_new_length() { __throw_bad_alloc(); }
}  // namespace std

#if _GLIBCXX_RELEASE >= 9
// GCC 9 has them.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
#endif
#endif
