"""Turns protos/ into src/tidemill/api/, or into one descriptor image for buf.

    python protos/generate.py                      writes src/tidemill/api/
    python protos/generate.py --out DIR            writes DIR/tidemill/api/ instead
    python protos/generate.py --image FILE         writes a descriptor image with its imports

Runs in the code generator's own environment (`make protos`), whose protobuf is the oldest that
the client supports: generated code demands a runtime at least as new as its generator.

The bounds in the protos are protovalidate options. The generated modules keep the options' bytes
and drop the import of buf/validate/validate.proto, so a client needs no protovalidate, while a
server's protovalidate still reads every rule from the descriptors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from grpc_tools import protoc

# The only copy of the rules' descriptor that comes in a wheel.
from protovalidate._gen.buf.validate import validate_pb

ROOT = Path(__file__).resolve().parent
RULES = "buf/validate/validate.proto"


def rules_descriptor() -> bytes:
    """The descriptor set of validate.proto and what it imports."""
    found = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, duration_pb2, timestamp_pb2, field_mask_pb2):
        module.DESCRIPTOR.CopyToProto(found.file.add())
    found.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    return found.SerializeToString()


def run_protoc(*arguments: str) -> None:
    """Runs protoc with our plugins; its failure is ours."""
    if protoc.main(["protoc", *arguments]) != 0:
        sys.exit("protoc failed")


def sources() -> list[str]:
    """All protos, relative to protos/."""
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))


def write_image(target: Path) -> None:
    """A descriptor set of all protos with comments and imports: what buf lints and compares."""
    with tempfile.NamedTemporaryFile(suffix=".binpb") as rules:
        Path(rules.name).write_bytes(rules_descriptor())
        run_protoc(
            f"-I{ROOT}",
            f"--descriptor_set_in={rules.name}",
            "--include_imports",
            "--include_source_info",
            f"-o{target}",
            *sources(),
        )


def without_rules_import(image: Path, target: Path) -> None:
    """Copies a descriptor set, less validate.proto and the imports of it. Option bytes stay."""
    files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
    kept = descriptor_pb2.FileDescriptorSet()
    for file in files.file:
        if file.name != RULES:
            imports = [name for name in file.dependency if name != RULES]
            del file.dependency[:]
            file.dependency.extend(imports)
            kept.file.append(file)
    target.write_bytes(kept.SerializeToString())


def write_packages(out: Path) -> None:
    """Gives every generated folder an __init__.py that says where it comes from."""
    api = out / "tidemill" / "api"
    folders = [p for p in api.rglob("*") if p.is_dir() and p.name != "__pycache__"]
    for folder in [api, *folders]:
        (folder / "__init__.py").write_text('"""Generated from protos/. Never edited."""\n')


def generate(out: Path) -> None:
    """Writes the Python modules, their stubs and their packages under `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        image, plain = Path(scratch, "all.binpb"), Path(scratch, "plain.binpb")
        write_image(image)
        without_rules_import(image, plain)
        run_protoc(
            f"--descriptor_set_in={plain}",
            f"--python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources(),
        )
    write_packages(out)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT.parent / "src")
    parser.add_argument("--image", type=Path, help="write only a descriptor image")
    arguments = parser.parse_args()
    if arguments.image:
        write_image(arguments.image)
    else:
        generate(arguments.out)


if __name__ == "__main__":
    main()
