"""Speed and memory of every op against its rivals: `python -m benchmarks` (docs/design.md, section 6)."""

import os

# The profiler counts memory here; its start and stop messages would break up the table.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
