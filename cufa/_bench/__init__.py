"""The benchmarks: rows, peers, measurements and reports, for ``cufa bench`` and the scripts in the repository."""
