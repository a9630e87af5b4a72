# With BuildKit, the default, only the files that COPY names are sent: no .dockerignore is needed.
# docker build -t clip-zss . && docker run --gpus all --shm-size 8g -v ~/data:/work/data clip-zss --help
# The standard torch package contains CUDA; the host needs only NVIDIA's driver and container toolkit.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE cli.py ./
COPY cache cache
COPY configs configs
COPY pipeline pipeline
COPY stages stages
RUN pip install --no-cache-dir -c constraints.txt ".[demo,s3]"
WORKDIR /work
ENTRYPOINT ["clip-zss"]
