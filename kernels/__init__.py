"""C++ for the few places where calls of torch cost more than their arithmetic; built when a compiler is there.

Every kernel has a plain form in lm/ or moonvit/, is tested equal to it, and is left out where it cannot be built:
`build.library(name)` gives None and says why in `build.reason(name)`.
"""
