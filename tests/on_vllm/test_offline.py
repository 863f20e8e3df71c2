"""vLLM's `LLM` with the plugin gives the tokens and takes the steps of `generate`; controls show that this can fail."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from bard_vl.serving.vllm import model as plugin
from bard_vl.serving.vllm.pieces import cut
from bard_vl.serving.vllm.scheduler import BlockScheduler
from oracle import ENDS, Oracle, Said, make_checkpoint, random_prompts
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler

pytestmark = pytest.mark.process  # vLLM asks what CPU it runs on

PAGE, BUDGET, ROOM = 32, 96, 256
# Around blocks of 4, pages of 32 and steps of 96; the last ones take several steps.
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 12, 31, 32, 33, 61, 64, 96, 97, 131, 165, 190]
SHORT, LONG = range(11), range(13, 18)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    """Pages of eight blocks, few enough to preempt; steps that cut long prompts."""
    return LLM(
        str(folder),
        dtype="float32",
        max_model_len=ROOM,
        max_num_seqs=8,
        max_num_batched_tokens=BUDGET,
        block_size=PAGE,
        num_gpu_blocks_override=30,
        limit_mm_per_prompt={"image": 3, "video": 1},
        enforce_eager=True,
        disable_log_stats=False,
    )


@pytest.fixture(autouse=True)
def no_pages(llm: LLM) -> None:
    """Every test begins without pages of others."""
    assert llm.reset_prefix_cache()


def params(max_tokens: int = 21, threshold: float = 0.02, **changes: Any) -> SamplingParams:
    extra = {"confidence_threshold": threshold, **changes.pop("extra_args", {})}
    return SamplingParams(
        **{"temperature": 0.0, "ignore_eos": True, **changes}, max_tokens=max_tokens, extra_args=extra
    )


def ask(llm: LLM, prompts: list[list[int]], sampling: Any) -> list[Any]:
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def count(llm: LLM, name: str) -> int:
    """A counter of vLLM's."""
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def same(left: list[list[int]], right: list[list[int]]) -> int:
    assert len(left) == len(right)
    return sum(a == b for a, b in zip(left, right, strict=True))


# --- attention --------------------------------------------------------------------------------------------------------

THRESHOLDS = (0.01, 0.02, 0.9)


@pytest.fixture(scope="session")
def texts(oracle: Oracle) -> tuple[list[list[int]], list[float], list[list[int]]]:
    """Prompts of all lengths, a threshold for each, and what `generate` says."""
    prompts = random_prompts(LENGTHS)
    thresholds = [THRESHOLDS[place % 3] for place in range(len(prompts))]
    said: list[list[int]] = [[] for _ in prompts]
    for threshold in THRESHOLDS:
        mine = [place for place, value in enumerate(thresholds) if value == threshold]
        answers = oracle.say([prompts[place] for place in mine], confidence_threshold=threshold, max_new_tokens=21)
        for place, answer in zip(mine, answers.tokens, strict=True):
            said[place] = answer
    return prompts, thresholds, said


def ask_texts(llm: LLM, texts: Any, places: Any) -> int:
    """The number of prompts at `places` that get the answer of `generate`."""
    prompts, thresholds, said = ([each[place] for place in places] for each in texts)
    return same(tokens(ask(llm, prompts, [params(threshold=value) for value in thresholds])), said)


def test_prompts_of_all_lengths_and_thresholds_together(llm: LLM, texts: Any) -> None:
    assert ask_texts(llm, texts, range(len(LENGTHS))) == len(LENGTHS)


def test_control_causal_attention(llm: LLM, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = plugin.build_attn_metadata
    monkeypatch.setattr(plugin, "build_attn_metadata", lambda **named: build(**{**named, "causal": True}))
    assert ask_texts(llm, texts, SHORT) == 0


def test_control_causal_prompt(llm: LLM, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(computed: np.ndarray, scheduled: np.ndarray, lengths: np.ndarray, block_size: int) -> Any:
        return cut(computed, scheduled, lengths, 1 if (computed < lengths).any() else block_size)

    monkeypatch.setattr(plugin, "cut", causal)
    assert ask_texts(llm, texts, SHORT) < len(SHORT) // 2


def test_control_chunks_that_cut_blocks(llm: LLM, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = BlockScheduler._reserve_prefill_lookahead

    def as_vllm_has_it(self: Any, request: Any, computed: int, new: int) -> int:
        return new if computed < request.num_prompt_tokens else own(self, request, computed, new)

    monkeypatch.setattr(BlockScheduler, "_reserve_prefill_lookahead", as_vllm_has_it)
    assert ask_texts(llm, texts, LONG) < len(LONG)


# --- steps, preemption ------------------------------------------------------------------------------------------------


def test_steps_are_those_of_generate(llm: LLM, oracle: Oracle) -> None:
    prompts = random_prompts([5, 8, 11, 14])
    said = oracle.say(prompts, confidence_threshold=0.02, max_new_tokens=60)
    before = count(llm, "diffusion_num_denoising_steps")
    assert tokens(ask(llm, prompts, params(60))) == said.tokens
    assert count(llm, "diffusion_num_denoising_steps") - before == said.steps


def test_preempted_requests_go_on(llm: LLM, oracle: Oracle) -> None:
    prompts, before = random_prompts([60, 61, 62, 63, 64, 65, 66, 67], seed=1), count(llm, "num_preemptions")
    said = oracle.say(prompts, confidence_threshold=0.02, max_new_tokens=70)
    assert tokens(ask(llm, prompts, params(70))) == said.tokens
    assert count(llm, "num_preemptions") > before


# --- pages ------------------------------------------------------------------------------------------------------------


def second_turns(llm: LLM, oracle: Oracle) -> tuple[int, int, int]:
    """Chats that go on: how many, how many right answers, and how many tokens came from pages."""
    prompts = random_prompts([33, 34, 38], seed=2)
    first = ask(llm, prompts, params(64))
    longer = [ids + answer + [3, 1, 4] for ids, answer in zip(prompts, tokens(first), strict=True)]
    second = ask(llm, longer, params(12))
    said = oracle.say(longer, confidence_threshold=0.02, max_new_tokens=12)
    return len(prompts), same(tokens(second), said.tokens), sum(output.num_cached_tokens for output in second)


def test_pages_of_prompts_are_shared_and_those_of_responses_are_not(llm: LLM, oracle: Oracle) -> None:
    asked, right, cached = second_turns(llm, oracle)
    assert right == asked
    assert cached == asked * PAGE  # the prompt's whole page, and none of the response


def test_control_pages_of_responses_are_shared(llm: LLM, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockScheduler, "add_request", DiffusionScheduler.add_request)
    asked, right, cached = second_turns(llm, oracle)
    assert cached > asked * PAGE
    assert right < asked


# --- pictures and videos ----------------------------------------------------------------------------------------------


def chat(*pictures: Any, text: str = "Describe the image.") -> list[dict[str, Any]]:
    """A chat in the form that vLLM takes pictures in."""
    content = [{"type": "image_pil", "image_pil": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def of_transformers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    content = [
        {"type": "image", "image": item["image_pil"]} if item["type"] == "image_pil" else item
        for item in messages[0]["content"]
    ]
    return [{"role": "user", "content": content}]


def test_pictures(llm: LLM, oracle: Oracle) -> None:
    sizes = [(96, 64), (64, 64), (160, 96)]
    pictures = [tiny.draw(size, seed) for seed, size in enumerate(sizes)]
    chats = [chat(picture) for picture in pictures]
    # A block holds the end of one picture and the beginning of the next; together they are more than a step takes.
    chats += [chat(pictures[0], pictures[1]), chat(*pictures, text="Which one?")]
    answers = llm.chat(chats, params(21), use_tqdm=False)
    settings = {"confidence_threshold": 0.02, "max_new_tokens": 21, "eos_token_id": []}
    assert tokens(answers) == [oracle.see(of_transformers(each), **settings).tokens[0] for each in chats]
    assert len({tuple(answer) for answer in tokens(answers)}) == len(chats)


def test_a_video(llm: LLM, oracle: Oracle) -> None:
    frames = np.stack([np.asarray(frame) for frame in tiny.draw_frames(6)])
    metadata = {"fps": 2.0, "duration": 3.0, "total_num_frames": 6, "frames_indices": list(range(6))}
    stated = {**metadata, "video_backend": "opencv", "do_sample_frames": False}
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    text = oracle.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = oracle.processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    said = oracle._run(inputs, confidence_threshold=0.02, max_new_tokens=21, eos_token_id=[])
    answer = llm.generate(
        {"prompt": text, "multi_modal_data": {"video": (frames, stated)}}, params(21), use_tqdm=False
    )[0]
    assert list(answer.prompt_token_ids) == inputs["input_ids"][0].tolist()
    assert list(answer.outputs[0].token_ids) == said.tokens[0]


# --- ends -------------------------------------------------------------------------------------------------------------

PROMPTS = random_prompts([6, 9, 13], seed=3)


@pytest.fixture(scope="session")
def long(oracle: Oracle) -> Said:
    return oracle.say(PROMPTS, confidence_threshold=0.02, max_new_tokens=24)


def test_a_response_ends_with_an_eos_wherever_it_is_in_its_block(llm: LLM, oracle: Oracle, long: Said) -> None:
    for place in (0, 5, 10, 15):
        ends = [answer[place] for answer in long.tokens]
        said = oracle.say(PROMPTS, confidence_threshold=0.02, max_new_tokens=24, eos_token_id=ends)
        answers = ask(llm, PROMPTS, params(24, stop_token_ids=ends))
        assert tokens(answers) == said.tokens
        assert [answer.outputs[0].finish_reason for answer in answers] == ["stop"] * 3


def test_the_checkpoints_own_eos_ends_a_response(llm: LLM, oracle: Oracle) -> None:
    prompts = random_prompts(list(range(2, 14)), seed=7)
    said = oracle.say(prompts, confidence_threshold=0.02, max_new_tokens=40, eos_token_id=ENDS)
    assert min(map(len, said.tokens)) < max(map(len, said.tokens)) == 40  # some of them come upon it
    assert tokens(ask(llm, prompts, params(40, ignore_eos=False))) == said.tokens


def test_any_number_of_tokens(llm: LLM, long: Said) -> None:
    for most in (1, 3, 4, 6, 11):
        answers = ask(llm, PROMPTS, params(most))
        assert tokens(answers) == [answer[:most] for answer in long.tokens]
        assert {answer.outputs[0].finish_reason for answer in answers} == {"length"}


def test_stop_strings_within_and_across_blocks(llm: LLM, oracle: Oracle) -> None:
    # Texts, not random ids: vLLM decodes a response together with its prompt's end.
    prompts = oracle.processor.tokenizer(["Describe the image.", "How many?", "one, two, three"])["input_ids"]
    long = oracle.say(prompts, confidence_threshold=0.02, max_new_tokens=24)
    pairs = [
        (prompt, place, oracle.text(answer[place : place + 2]))
        for prompt, answer in zip(prompts, long.tokens, strict=True)
        for place in range(1, 22)
    ]
    whole = [pair for pair in pairs if len(pair[2]) > 1 and pair[2].isascii() and pair[2].isprintable()]
    across, within = ([pair for pair in whole if (pair[1] % 4 == 3) is crosses] for crosses in (True, False))
    assert across
    assert within
    for prompt, _, stop in [*across[:3], *within[:3]]:
        settings = {"confidence_threshold": 0.02, "max_new_tokens": 24, "stop_strings": [stop]}
        (said,) = oracle.say([prompt], **settings).tokens
        (out,) = ask(llm, [prompt], params(24, stop=[stop], include_stop_str_in_output=True))
        assert out.outputs[0].finish_reason == "stop"
        assert out.outputs[0].text.endswith(stop)
        assert list(out.outputs[0].token_ids)[: len(said)] == said  # the whole block came out; its text is cut
        # Halves of characters are counted differently where a text is decoded in parts.
        whole = oracle.text(said).replace("\ufffd", "")
        assert out.outputs[0].text.replace("\ufffd", "") == whole[: whole.find(stop) + len(stop)]


def test_the_models_length_ends_a_response(llm: LLM, oracle: Oracle) -> None:
    prompts = random_prompts([ROOM - 11, ROOM - 8, ROOM - 4, ROOM - 2], seed=4)
    answers = ask(llm, prompts, params(100))
    said = oracle.say(prompts, confidence_threshold=0.02, max_new_tokens=8)
    assert tokens(answers) == [said.tokens[0], said.tokens[1], said.tokens[2][:4], []]
    assert {answer.outputs[0].finish_reason for answer in answers} == {"length"}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_rules_and_steps_of_each_request(llm: LLM, oracle: Oracle) -> None:
    wanted = [
        {"denoising_steps": 1},
        {"denoising_steps": 3, "confidence_threshold": 0.9},
        {"remasking_strategy": "low_confidence_static", "denoising_steps": 2},
        {"remasking_strategy": "margin", "confidence_threshold": 0.01},
        {"remasking_strategy": "entropy_bounded", "entropy_bound": 6.0},
        {"remasking_strategy": "factor", "factor": 3.0},
        {"remasking_strategy": "frechet", "denoising_steps": 3},
    ]
    prompts = random_prompts([10 + n for n in range(len(wanted))], seed=5)
    before = count(llm, "diffusion_num_denoising_steps")
    answers = ask(llm, prompts, [params(21, extra_args=each) for each in wanted])
    said = [
        oracle.say([prompt], **{"confidence_threshold": 0.02, **each}, max_new_tokens=21)
        for prompt, each in zip(prompts, wanted, strict=True)
    ]
    assert tokens(answers) == [each.tokens[0] for each in said]
    assert count(llm, "diffusion_num_denoising_steps") - before == sum(each.steps for each in said)


def test_sampling_repeats_generate_with_the_same_seed(llm: LLM, oracle: Oracle) -> None:
    prompts, ways = random_prompts([9, 10, 11], seed=6), [{"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.8}]
    sampled = []
    for way in ways:
        mixed = [params(21, seed=5, **way), params(21), params(21, seed=7, **way, top_k=9)]
        answers = tokens(ask(llm, prompts, mixed))
        settings = {"confidence_threshold": 0.02, "max_new_tokens": 21}
        said = [
            oracle.say(prompts[:1], **settings, **way, seed=5),
            oracle.say(prompts[1:2], **settings),
            oracle.say(prompts[2:], **settings, **way, top_k=9, seed=7),
        ]
        assert answers == [each.tokens[0] for each in said]
        sampled.append(answers[0])
    other = ask(llm, prompts[:1], params(21, seed=6, **ways[0]))
    assert len({tuple(each) for each in [*sampled, tokens(other)[0]]}) == 3


def test_requests_without_a_temperature_are_greedy_and_without_a_cap(llm: LLM, oracle: Oracle) -> None:
    stated = llm.get_default_sampling_params()
    assert (stated.temperature, stated.max_tokens) == (0.0, SamplingParams().max_tokens)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logprobs": 2}, "logprobs=2"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"extra_args": {"denoising_steps": 9}}, "denoising_steps.*9"),
        ({"extra_args": {"block_size": 8}}, "block_size"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_by_name(llm: LLM, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(VLLMValidationError, match=said):
        ask(llm, PROMPTS[:1], params(4, **changes))


def test_an_aborted_request_changes_nothing_for_others(llm: LLM, long: Said) -> None:
    engine, done = llm.llm_engine, {}
    for name, prompt in zip("abc", PROMPTS, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params(24))
    for step in range(1000):
        if step == 4:
            engine.abort_request(["b"])
        done |= {output.request_id: output for output in engine.step() if output.finished}
        if not engine.has_unfinished_requests():
            break
    assert [list(done[name].outputs[0].token_ids) for name in "ac"] == [long.tokens[0], long.tokens[2]]
    assert "b" not in done or len(done["b"].outputs[0].token_ids) < 24


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"max_num_batched_tokens": 4, "max_model_len": 4}, "--max-num-batched-tokens.*8"),
        ({"diffusion_config": {"canvas_length": 8}}, "--diffusion-config of other than 4 tokens"),
        ({"attention_backend": "FLASH_ATTN"}, "--attention-backend FLASH_ATTN"),
        ({"disable_chunked_mm_input": True}, "--disable-chunked-mm-input"),
        ({"long_prefill_token_threshold": 3}, "--long-prefill-token-threshold below two blocks, 8"),
        ({"override_generation_config": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size=2"),
    ],
)
def test_options_that_give_other_tokens_are_refused_by_name(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        EngineArgs(str(folder), **options).create_engine_config()
