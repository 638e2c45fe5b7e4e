"""Where a file's time goes, kernel by kernel: one reader for each runtime's own profiler."""
