"""The model as lm-eval sees it. Imports lm-eval: import this module only where it is installed.

Every rank runs the harness with all requests, as if it were alone; the requests are shared out
below it, and every rank gets all answers.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from torchtitan.data.chat_template import ChatTemplate, encode_rendered
from torchtitan.data.document_ends import Ends
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.evaluation.scoring import Place, ScoredText, Scorer
from torchtitan.generation.generate import Generator, Limits, Prompt
from torchtitan.generation.sampling import SamplingParams

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_UNDERSTOOD = frozenset({*_SAMPLING, "until", "max_gen_toks", "do_sample"})


class HarnessModel(TemplateLM):
    """Answers the requests of lm-eval's tasks as its own Hugging Face backend does.

    `generator` may be None where no task generates.
    """

    def __init__(
        self,
        scorer: Scorer,
        place: Place,
        tokenizer: Tokenizer,
        *,
        generator: Generator | None = None,
        eos_ids: frozenset[int] = frozenset(),
        template: ChatTemplate | None = None,
    ):
        super().__init__()
        self._scorer, self._place, self._tokenizer_of_model = scorer, place, tokenizer
        self._generator, self._eos_ids, self._template = generator, eos_ids, template
        self._special_ids: Mapping[str, int] = getattr(tokenizer, "special_ids", {})
        self._warned: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self._tokenizer_of_model.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the start token, else the end token."""
        start = self._tokenizer_of_model.bos_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer, for lm-eval's caches."""
        return self._tokenizer_of_model.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text; the start token is not put before a text that has one."""
        tokenizer = self._tokenizer_of_model
        ids = encode_rendered(string, tokenizer)
        begins = getattr(tokenizer, "ends", Ends()).bos
        if add_special_tokens is not None:
            begins &= add_special_tokens
        elif ids[:1] == [tokenizer.bos_id]:
            begins = False
        return [tokenizer.bos_id, *ids] if begins and tokenizer.bos_id is not None else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation; without the prompt its last message goes on."""
        assert self._template is not None
        text = self._template.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and if it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        most = self._place.max_seq_len + 1  # the last token is no input
        texts = [
            ScoredText((context + targets)[-most:], min(len(targets), most - 1))
            for _, context, targets in requests
        ]
        return [tuple(score) for score in self._scorer.score(texts)]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, read in windows with the longest contexts."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._place.max_seq_len,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Return a continuation of each context, up to one of its stop strings."""
        by_arguments: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_arguments.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for numbers in by_arguments.values():
            contexts = {number: requests[number].args[0] for number in numbers}
            arguments = normalize_gen_kwargs(requests[numbers[0]].args[1])
            texts |= self._generate(contexts, arguments)
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: dict[int, str], arguments: Any) -> dict[int, str]:
        assert self._generator is not None
        limits, params = self._limits(arguments), self._sampling(arguments)
        place, dims, texts = self._place, self._place.dims, dict[int, str]()
        room = place.max_seq_len - limits.max_new_tokens
        prompts = [
            Prompt(number, self.tok_encode(text)[-room:] or [self.prefix_token_id])
            for number, text in contexts.items()
        ]
        prompts.sort(key=lambda prompt: -len(prompt.ids))
        report = place.progress("prompts", len(prompts))
        for begin in range(0, len(prompts), place.requests_at_once):
            place.check_stop()
            batch = prompts[begin : begin + place.requests_at_once]
            mine = batch[dims.dp_rank(place.world.rank) :: dims.dp]
            completions = []
            if mine or dims.dp_shard > 1:  # who has no prompts gathers weights for the others
                # The cache's attention, in the shapes of every step, would compile each time.
                with torch.compiler.set_stance("force_eager"):
                    completions = self._generator.generate(mine, limits, params)
            answers = [[completion.number, completion.text] for completion in completions]
            for answer in place.world.gather_json(answers):
                texts |= dict(map(tuple, answer))
            report(begin + len(batch))
        for text in arguments["until"]:  # a stop string may end within a token of more text
            texts = {
                number: found.split(text)[0] if text else found for number, found in texts.items()
            }
        return texts

    def _limits(self, arguments: Any) -> Limits:
        most, stop = arguments["max_gen_toks"], [text for text in arguments["until"] if text]
        if most >= self._place.max_seq_len:
            shorter = self._place.max_seq_len // 2
            self._warn(f"{most} new tokens leave no room for a context: generates {shorter}")
            most = shorter
        ends = {self._special_ids[text] for text in stop if text in self._special_ids}
        return Limits(most, frozenset({self.eot_token_id, *self._eos_ids, *ends}), tuple(stop))

    def _sampling(self, arguments: Any) -> SamplingParams:
        if unknown := sorted(set(arguments) - _UNDERSTOOD):
            self._warn(f"does not know these settings of a task: {', '.join(unknown)}")
        given = {name: arguments[name] for name in _SAMPLING if arguments.get(name) is not None}
        if not arguments["do_sample"]:
            given["temperature"] = 0.0
        elif "temperature" not in given:
            given["temperature"] = 1.0
        return SamplingParams(**given)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._place.world.device
