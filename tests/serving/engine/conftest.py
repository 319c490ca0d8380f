"""Without vLLM there is nothing to test here: `make test-vllm` runs these in an environment of their own."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
