"""Package metadata. Versions the tests ran with are pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="ilvr_ds",
    version="0.1.0",
    description="DeepSpeed training pipeline for Interleaved Latent Visual Reasoning (ILVR)",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ilvr_ds*", "data_tools*"]),
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "transformers>=5.17",
        "webdataset>=1.0.2",
        "pillow>=11",
        "imagecodecs>=2025.3",  # decoding of stored images, into memory it is given
        "pyyaml>=6",
        "numpy>=1.26",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "psutil>=5.9",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],  # needs CUDA and a compiler; without it torch's own kernels are used
        "puzzles": ["gymnasium>=0.29,<1.3"],  # the FrozenLake sprites; 1.4 replaced them
        "formats": ["pyarrow>=17", "zstandard>=0.22"],  # records in parquet files and .zst
        "remote": ["fsspec[http]>=2024.6", "s3fs>=2024.6"],  # shards behind http(s):// and s3:// URLs
        "report": ["matplotlib>=3.8", "tensorboard>=2.16"],
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.6"],
    },
)
