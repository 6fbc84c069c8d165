# The images of Catalens, one target each: ingest, embedder, query, standalone (everything in one process, and the
# command line), and with torch, gigabytes: torch (the command line for `catalens model`) and cuda (a worker on a GPU).
#
#     make images                     # docs/how-to/docker.md
#
# Every package is a locked wheel, so nothing is compiled. The base is pinned by version; `make image-digests` adds the
# digest that the registry answers with. Each image stands behind what it is made from and before what it is not: a
# builder that carries out all stages above its target installs no torch for a service.
FROM python:3.13.14-slim-trixie AS python

# A model to bake in: docker build --build-context model=FOLDER --build-arg MODEL=/opt/model. Without it this is empty.
FROM scratch AS model

# What the images stand on: a good half of the base is of no use to them, and would be in each (docs/adr/0024).
FROM python AS base
COPY deploy/images/lean.sh /opt/lean.sh
RUN sh /opt/lean.sh

FROM python AS tools
COPY requirements/image-build.txt /src/requirements/
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --only-binary :all: --require-hashes -r /src/requirements/image-build.txt

FROM tools AS wheel
COPY LICENSE README.md pyproject.toml /src/
COPY demo /src/demo
COPY models/starter/bundle /src/models/starter/bundle
COPY scripts/hatch_build.py /src/scripts/
COPY services /src/services
COPY shared /src/shared
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels /src

# --- What all images have

FROM scratch AS runtime
# Whole and onto nothing: what a layer deletes is still in the one below it.
# hadolint ignore=DL3067
COPY --from=base / /
ARG CREATED="" MODEL="" REVISION="" SOURCE="" VERSION=""
LABEL org.opencontainers.image.title="Catalens" \
      org.opencontainers.image.description="Self-hosted multimodal product search" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}"
# Beyond the container's own loopback a service starts only with CATALENS_API_KEYS or CATALENS_ALLOW_ANONYMOUS=true.
ENV PATH=/opt/catalens/bin:/usr/local/bin:/usr/sbin:/usr/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    CATALENS_DATA_DIR=/data \
    CATALENS_HTTP__HOST=0.0.0.0 \
    CATALENS_LOG_FORMAT=json \
    CATALENS_MODEL=${MODEL}
COPY deploy/images/probe.py /opt/probe.py
COPY --from=model / /opt/model/
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "/opt/probe.py", "/livez"]

# --- Environments, copied whole into their images: locked packages first, then Catalens itself, then the list of both.

FROM tools AS env-ingest
COPY requirements/image-ingest.txt /src/requirements/
RUN python -m venv --without-pip /opt/catalens \
    && /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --only-binary :all: --require-hashes -r /src/requirements/image-ingest.txt
COPY --from=wheel /wheels /wheels
# Ingest reads no more of a model than what it calls itself, and is no other service. What compilers and editors read
# (*.pyi and the like) is of no use in any image.
RUN /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --no-deps /wheels/*.whl \
    && for other in embedder query standalone; do rm -r /opt/catalens/lib/python*/site-packages/catalens_$other; done \
    && rm /opt/catalens/bin/catalens /opt/catalens/bin/catalens-embedder /opt/catalens/bin/catalens-query \
    && find /opt/catalens -regex '.*\.\(c\|h\|hpp\|proto\|pxd\|pyi\|pyx\)' -delete \
    && rm /opt/catalens/lib/python*/site-packages/catalens/bundles/starter/*.onnx \
    && rm /opt/catalens/lib/python*/site-packages/catalens/bundles/starter/tokenizer.json \
    && /opt/build/bin/cyclonedx-py environment --output-reproducible --output-file /opt/catalens/sbom.cdx.json /opt/catalens

FROM runtime AS ingest
COPY --from=env-ingest /opt/catalens /opt/catalens
ENTRYPOINT ["catalens-ingest"]

FROM tools AS env-encoder
COPY requirements/image-encoder.txt /src/requirements/
# OpenVINO comes with devices that Catalens does not use.
RUN python -m venv --without-pip /opt/catalens \
    && /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --only-binary :all: --require-hashes -r /src/requirements/image-encoder.txt \
    && rm -f /opt/catalens/lib/python*/site-packages/openvino/libs/libopenvino_intel_gpu_plugin.so \
    && rm -f /opt/catalens/lib/python*/site-packages/openvino/libs/libopenvino_intel_npu_plugin.so \
    && rm -f /opt/catalens/lib/python*/site-packages/openvino/libs/cache.json \
    && rm -rf /opt/catalens/lib/python*/site-packages/openvino/include
COPY --from=wheel /wheels /wheels
RUN /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --no-deps /wheels/*.whl \
    && rm -r /opt/catalens/lib/python*/site-packages/catalens_standalone/demo \
    && find /opt/catalens -regex '.*\.\(c\|h\|hpp\|proto\|pxd\|pyi\|pyx\)' -delete \
    && /opt/build/bin/cyclonedx-py environment --output-reproducible --output-file /opt/catalens/sbom.cdx.json /opt/catalens

FROM runtime AS embedder
COPY --from=env-encoder /opt/catalens /opt/catalens
# Its HTTP side has probes and metrics and nothing to protect.
ENV CATALENS_ALLOW_ANONYMOUS=true
ENTRYPOINT ["catalens-embedder"]

FROM runtime AS query
COPY --from=env-encoder /opt/catalens /opt/catalens
ENTRYPOINT ["catalens-query"]

FROM tools AS env-standalone
COPY requirements/image-standalone.txt /src/requirements/
RUN python -m venv --without-pip /opt/catalens \
    && /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --only-binary :all: --require-hashes -r /src/requirements/image-standalone.txt \
    && rm -f /opt/catalens/lib/python*/site-packages/openvino/libs/libopenvino_intel_gpu_plugin.so \
    && rm -f /opt/catalens/lib/python*/site-packages/openvino/libs/libopenvino_intel_npu_plugin.so \
    && rm -f /opt/catalens/lib/python*/site-packages/openvino/libs/cache.json \
    && rm -rf /opt/catalens/lib/python*/site-packages/openvino/include
COPY --from=wheel /wheels /wheels
# The demo catalogue gets an address that no version of Python changes.
RUN /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --no-deps /wheels/*.whl \
    && mv /opt/catalens/lib/python*/site-packages/catalens_standalone/demo /opt/catalens/demo \
    && ln -s /opt/catalens/demo "$(echo /opt/catalens/lib/python*/site-packages/catalens_standalone)/demo" \
    && find /opt/catalens -regex '.*\.\(c\|h\|hpp\|proto\|pxd\|pyi\|pyx\)' -delete \
    && /opt/build/bin/cyclonedx-py environment --output-reproducible --output-file /opt/catalens/sbom.cdx.json /opt/catalens

FROM runtime AS standalone
COPY scripts/qdrant_drill.py /opt/qdrant_drill.py
COPY --from=env-standalone /opt/catalens /opt/catalens
ENTRYPOINT ["catalens"]
CMD ["serve"]

FROM tools AS env-torch
COPY requirements/image-torch.txt /src/requirements/
RUN python -m venv --without-pip /opt/catalens \
    && /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --only-binary :all: --require-hashes -r /src/requirements/image-torch.txt
COPY --from=wheel /wheels /wheels
RUN /opt/build/bin/pip --python /opt/catalens install --no-cache-dir --no-deps /wheels/*.whl \
    && /opt/build/bin/cyclonedx-py environment --output-reproducible --output-file /opt/catalens/sbom.cdx.json /opt/catalens

FROM runtime AS torch
COPY --from=env-torch /opt/catalens /opt/catalens
ENTRYPOINT ["catalens"]

# torch's wheels bring CUDA; the driver is the host's, given by NVIDIA's container runtime.
FROM torch AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CATALENS_ENCODER__RUNTIME=torch \
    CATALENS_ENCODER__DEVICE=cuda \
    CATALENS_ALLOW_ANONYMOUS=true
ENTRYPOINT ["catalens-embedder"]

# Last, so that a plain `docker build .` makes it.
FROM standalone
