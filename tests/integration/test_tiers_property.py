"""U1 and U2 over random chains that lie in random tiers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from services.cache.node import CacheNode
from tests.cache_node import cache_client, cache_node
from tests.tiny_model import make_tiny_checkpoint
from tests.worker_harness import PATIENT, Tls, make_start, prompt_of, worker_at
from tidemill.api.common.v1.lifecycle_pb2 import KvPeer
from tidemill.api.common.v1.usage_pb2 import PREFILL_SITE_PREFILL_WORKER, PromptUsage
from tidemill.engine import BlockPool
from tidemill.kv.segments import to_bytes
from tidemill.worker.config import CacheConfig, Role
from tidemill.worker.process import RunningWorker
from tidemill.worker.prompt import Prompt

TIERS = ("none", "device", "host", "cache_ram", "peer")


@dataclass
class Scene:
    """A worker that asks, and where it may find blocks."""

    asker: RunningWorker
    holder: RunningWorker
    cache: CacheNode
    tls: Tls
    loop: asyncio.AbstractEventLoop
    num_prompts: int = 0

    @property
    def pool(self) -> BlockPool:
        return self.asker.worker.engine.pool

    @property
    def peer(self) -> KvPeer:
        return KvPeer(worker_id="holder", address=self.holder.address, role="prefill")

    async def usage_of(self, tiers: list[str], num_tokens: int) -> PromptUsage:
        """Lay a fresh prompt's blocks where `tiers` says, and let the asker reuse them."""
        self.num_prompts += 1
        task = make_start(prompt_of(num_tokens, seed=self.num_prompts)).task
        task.peers.append(self.peer)
        reuse = self.asker.worker.reuse
        prompt = await reuse.identify(task)
        payloads = await self._lay(prompt, tiers)
        blocks = reuse.take(prompt, reuse.reusable(prompt), num_positions=num_tokens)
        try:
            await reuse.fetch(blocks)
            for index in range(blocks.num_cached_tokens // 64):
                latents = self.pool.read_block(blocks.block_table[index])
                assert to_bytes(latents) == payloads[index]
            assert blocks.num_computed_tokens == min(blocks.num_cached_tokens, num_tokens - 1)
            return blocks.usage(PREFILL_SITE_PREFILL_WORKER, "asker")
        finally:
            blocks.release()
            self._forget_all()

    async def _lay(self, prompt: Prompt, tiers: list[str]) -> list[bytes]:
        shape = self.pool.latents[:, 0].shape
        payloads = []
        async with cache_client(self.tls, self.cache.address) as client:
            for block_hash, tier in zip(prompt.hashes, tiers, strict=False):
                values = torch.randn(shape)
                payloads.append(to_bytes(values))
                if tier == "device":
                    put(self.pool, block_hash, prompt.root, values)
                elif tier == "host":
                    host = self.pool._host
                    slot = host.reserve()
                    assert slot is not None
                    host.latents[slot].copy_(values)
                    host.keep(slot, block_hash, prompt.root)
                elif tier == "cache_ram":
                    await client.store(prompt.namespace, [(block_hash, payloads[-1])])
                elif tier == "peer":
                    put(self.holder.worker.engine.pool, block_hash, prompt.root, values)
        return payloads

    def _forget_all(self) -> None:
        """Both pools are as new, so that no example sees another's evictions."""
        for running in (self.asker, self.holder):
            pool = running.worker.engine.pool
            pool.check_idle()
            pool.release(pool.allocate(pool.num_blocks))
            host = pool._host
            slots = [slot for _ in range(host.num_blocks) if (slot := host.reserve()) is not None]
            for slot in slots:
                host.drop(slot)
            pool.check_idle()


def put(pool: BlockPool, block_hash: bytes, root: bytes, values: torch.Tensor) -> None:
    [block] = pool.allocate(1)
    pool.write_block(block, values)
    pool.commit(block, block_hash, root)
    pool.release([block])


@asynccontextmanager
async def open_scene(model_dir: Path, tls: Tls) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(cache_node(tls))
        shared = CacheConfig(cache.address, client=PATIENT)
        asker = await stack.enter_async_context(
            worker_at(
                Role.PREFILL,
                model_dir,
                tls,
                worker_id="asker",
                num_blocks=24,
                host_cache_blocks=16,
                cache=shared,
            )
        )
        holder = await stack.enter_async_context(
            worker_at(Role.PREFILL, model_dir, tls, worker_id="holder", num_blocks=24)
        )
        yield Scene(asker, holder, cache, tls, asyncio.get_running_loop())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tls_files: Tls) -> Iterator[Scene]:
    """One scene for all examples, on a loop that they share."""
    model_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with asyncio.Runner() as runner:
        opened = open_scene(model_dir, tls_files)
        yield runner.run(opened.__aenter__())
        runner.run(opened.__aexit__(None, None, None))


@given(
    tiers=st.lists(st.sampled_from(TIERS), max_size=8),
    num_tokens=st.integers(1, 8 * 64 + 1),
)
@example(tiers=["device", "host", "cache_ram", "host", "peer", "cache_ram"], num_tokens=400)
@example(tiers=["peer", "cache_ram", "peer", "cache_ram", "device"], num_tokens=321)
@example(tiers=["device"] * 8, num_tokens=512)
@example(tiers=["device", "host"], num_tokens=128)
@example(tiers=["host", "cache_ram"], num_tokens=128)
@example(tiers=["cache_ram", "peer"], num_tokens=128)
@example(tiers=["peer"], num_tokens=64)
@example(tiers=["none", "device"], num_tokens=200)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_token_is_counted_once_in_the_tier_where_its_block_lay(
    scene: Scene, tiers: list[str], num_tokens: int
) -> None:
    usage = scene.loop.run_until_complete(scene.usage_of(tiers, num_tokens))
    found = tiers[: num_tokens // 64]
    found = found[: found.index("none")] if "none" in found else found
    expected = {tier: 64 * len(list(same)) for tier, same in groupby(sorted(found))}
    if 64 * len(found) == num_tokens:  # the last token's latent was there, but it was computed
        expected[found[-1]] -= 1
    split = {
        "device": usage.reused_device_tokens,
        "host": usage.reused_host_tokens,
        "cache_ram": usage.reused_cache_ram_tokens,
        "cache_disk": usage.reused_cache_disk_tokens,
        "peer": usage.reused_peer_tokens,
    }
    assert {tier: count for tier, count in split.items() if count} == expected
    assert usage.prompt_tokens == num_tokens
    assert usage.computed_tokens == num_tokens - sum(split.values())
