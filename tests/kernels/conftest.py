def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device (python -m pytest -m gpu runs all of them)")
