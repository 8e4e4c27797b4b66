"""Redaction: what a name or a shape gives away is hidden in every form; a tokenizer's tokens and common words stay."""

import json
import sys

import pytest

from hf_sai.runs.environment import command_line, settings_of
from hf_sai.runs.record import RunRecord
from hf_sai.runs.redact import known_secrets, redact, redact_text, redact_words

SECRET = "s3cr3t" + "Value99"
VARIABLES = (
    *("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "DB_PWD", "KEY_PASSPHRASE", "DEPLOY_KEY", "PGPASS", "PGPASSWORD"),
    *("HF_TOKEN", "WANDB_API_KEY", "GITHUB_PAT", "MY_SECRET", "SMTP_PASS", "GOOGLE_CREDENTIALS", "REGISTRY_AUTH"),
)


@pytest.mark.parametrize("name", VARIABLES)
def test_what_a_variable_of_the_environment_holds_is_hidden(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert redact_text(f"it is {SECRET}, really") == "it is <redacted>, really"
    assert redact_text(f"{name}=x1 python train.py") == f"{name}=<redacted> python train.py"


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "SORT_KEYS", "TOKENIZERS_PARALLELISM", "KEYBOARD"])
def test_variables_that_only_sound_like_secrets_are_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert SECRET not in known_secrets()


FINGERPRINT = "7169605F62C751356D054A26A821E680E5FA6305"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GPG_KEY", FINGERPRINT),
        ("SORT_KEY", "learning_rate"),
        ("SSH_PUBLIC_KEY", SECRET),
        ("SECRET_NAME", "my-weights"),
    ],
)
def test_what_a_variable_holds_that_reads_like_words_or_is_public_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redact_text(f"it is {value}, really") == f"it is {value}, really"


@pytest.mark.parametrize(("name", "value"), [("GPG_KEY", "bm90" * 20), ("SORT_KEY", SECRET)])
def test_a_key_that_does_not_look_harmless_is_hidden(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert value not in redact_text(f"it is {value}, really")


@pytest.mark.parametrize("value", ["password", "Postgres", "transformers"])
def test_a_password_that_is_a_common_word_does_not_hide_the_word(value, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", value)
    assert redact({"description": f"Finds a {value} in texts."}) == {"description": f"Finds a {value} in texts."}
    assert redact_text(f"--db_password {value}") == "--db_password <redacted>"


FLAGS = (
    *("hub_token", "secret_key", "access_key", "private_key", "passphrase", "pwd", "auth", "password", "api-key"),
    *(
        "hf_token",
        "token",
        "wandb_api_key",
        "storage_key",
        "neptune_api_token",
        "my_token",
        "db_pass",
        "aws_session_token",
    ),
    *("hf_token_2", "password2", "API_KEY_1", "HF_TOKEN_WRITE", "secret_value", "creds"),
)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    "form",
    [
        "--{flag} {secret} --lr 1",
        "--{flag}={secret} --lr 1",
        "--{flag} '{secret} more' --lr 1",
        "trainer.{flag}={secret} x=1",
        "+trainer.{flag}={secret} x=1",
        '{{"{flag}": "{secret}", "x": 1}}',
        "{{'{flag}': '{secret}', 'x': 1}}",
        '--json \'{{\\"{flag}\\": \\"{secret}\\"}}\'',
        "https://host/path?{flag}={secret}&x=1",
        "a=1,{flag}={secret},x=1",
    ],
)
def test_what_a_flag_or_setting_holds_is_hidden_in_every_form(flag, form):
    text = form.format(flag=flag, secret=SECRET)
    shown = redact_text(text)
    assert SECRET not in shown
    assert "<redacted>" in shown
    assert redact_text(shown) == shown
    assert redact({flag: SECRET, "list": [text]}) == {flag: "<redacted>", "list": [shown]}


def test_a_password_of_digits_is_hidden_and_other_numbers_stay():
    settings = {"db_password": 12345678, "nested": {"api_key": [12345.5]}}
    assert redact(settings) == {"db_password": "<redacted>", "nested": {"api_key": ["<redacted>"]}}
    numbers = {"seed": 12345678, "token": 50256, "pad_token": 50257, "max_tokens": 4096, "pass": 2, "use_auth": True}
    assert redact(numbers) == numbers


@pytest.mark.parametrize("text", ["Authorization: Bearer x", '{"Authorization": "Bearer x"}', f"bearer {SECRET}"])
def test_headers_that_let_somebody_in_are_hidden(text):
    assert "<redacted>" in redact_text(text)
    assert SECRET not in redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        f"machine api.wandb.ai login user password {SECRET}",
        f"train.py --hub_token \\\n    {SECRET} \\\n    --lr 1",
        f"setenv HF_TOKEN {SECRET}",
        f"set -gx HF_TOKEN {SECRET}",
        f"ENV HF_TOKEN {SECRET}",
        f"%env HF_TOKEN {SECRET}",
        "wandb login " + "0a1b2c3d" * 5,
        f'hub_token: str = "{SECRET}"',
        f'os.environ["HF_TOKEN"] = "{SECRET}"',
        f'"note": "its api_key: {SECRET}"',
        f"<password>{SECRET}</password>",
        f'<add key="ApiKey" value="{SECRET}"/>',
        f"- name: HF_TOKEN\n  value: {SECRET}",
        f'os.environ.setdefault("HF_TOKEN", "{SECRET}")',
        f'parser.add_argument("--hub_token", default="{SECRET}")',
        f'password: str = field(default="{SECRET}")',
        f'password := ("{SECRET}")',
        f"'password' => '{SECRET}'",
        f'{{"password": [["{SECRET}"]]}}',
        "https://hooks.slack.com/services/T01A2B3C4/B01A2B3C4/" + "a1B2" * 6,
        "https://discord.com/api/webhooks/123456789012345678/" + "a1B2" * 17,
        "https://x.blob.core.windows.net/c?sv=2022-11-02&sig=" + "a1B2" * 10 + "%3D",
    ],
)
def test_other_ways_to_write_a_secret_down_are_known(text):
    shown = redact_text(text)
    assert "<redacted>" in shown
    assert not any(part in shown for part in (SECRET, "0a1b2c3d", "a1B2a1B2"))


def test_a_flags_value_is_hidden_in_a_list_of_words_some_of_which_have_blanks():
    shown = redact({"argv": ["train.py", "--prompt", "a photo", "--password", SECRET, "--pw", f"{SECRET} b"]})
    assert shown == {"argv": ["train.py", "--prompt", "a photo", "--password", "<redacted>", "--pw", "<redacted>"]}
    texts = {"notes": ["- hub_token", "read from the environment", "-- password", "asked for at the prompt"]}
    assert redact(texts) == texts


def test_what_stands_deeper_under_a_secrets_name_is_hidden():
    settings = {
        "auth": {"token": {"value": SECRET}},
        "api_keys": [SECRET],
        "env": [{"name": "HF_TOKEN", "value": SECRET}, {"name": "LR", "value": "1e-3"}],
    }
    shown = redact(settings)
    assert SECRET not in str(shown)
    assert shown["env"][1] == {"name": "LR", "value": "1e-3"}


SHAPES = (
    *(
        "hf_" + "a1B2" * 8,
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "a1B2" * 9,
        "glpat-" + "a1B2" * 5,
        "sk-proj-" + "a1B2" * 9,
    ),
    *("AKIA" + "A1B2" * 4, "AIza" + "a1B2c" * 7, "xoxb-1234567890-" + "a1B2" * 4, "GOCSPX-" + "a1B2" * 7),
    *(
        "xapp-1-A0123456789-1234567890123-" + "ab12" * 16,
        "hvs." + "a1B2" * 24,
        "r8_" + "a1B2" * 9 + "x",
        "gsk_" + "a1B2" * 13,
    ),
    *("hf_oauth_" + "a1B2" * 9, "whsec_" + "a1B2" * 8, "rpa_" + "A1B2" * 10, "tvly-" + "a1B2" * 8, "fw_" + "a1B2" * 6),
    *("e2b_" + "0a1b" * 10, "csk-" + "0a1b" * 12, "shpat_" + "0a1b" * 8, "sntrys_" + "a1B2" * 12, "SK" + "0a1b" * 8),
    *("SG." + "a1B2c3" * 3 + "a1B2." + "a1B" * 14 + "a", "1234567890:AA" + "a1B" * 11, "ATATT3" + "a1B2" * 20),
    *("aB18Q~" + "a1B2" * 8 + "aa", "NRAK-" + "A1B" * 9, "AGE-SECRET-" + "KEY-1" + "A1" * 29, "tgp_v1_" + "a1B2" * 10),
    *("nvapi-" + "a1B2" * 16, "xai-" + "a1B2" * 20, "dapi" + "0a1b" * 8, "KGAT_" + "0a1b" * 8, "sk_live_" + "a1B2" * 6),
)


@pytest.mark.parametrize("secret", SHAPES)
def test_what_has_the_shape_of_a_token_is_hidden_anywhere(secret):
    assert redact_text(f"see {secret}.") == "see <redacted>."
    assert redact_text(f"https://user:{secret}@host/x") == "https://<redacted>@host/x"


HARMLESS = (
    "--eos_token <|im_end|> --pad_token <pad> --image_token <image> --bos_token=<s> --mask_token [MASK]",
    "--placeholder_token <cat-toy> --initializer_token toy --unk_token unk",
    "--tokenizer_name gpt2 --num_input_tokens 5 --max_new_tokens 3 --eos_token_id 2 --dataset_text_key text",
    "--use_auth_token True --token_type ids --label_key y --sort_key=z",
    '{"eos_token": "</s>", "image_token": "<image>", "token": 50256}',
    "The password is asked for, the token: it names the secret of tokens.",
    "Bearer of bad news, basic training",
    "bearer of_good_news_to_everybody_here",
    "--user_token <|user|> --bot_token <bot> --api_token <api> --storage_key weights --s3_key train/data.json",
    "--client_key client_id --hf_key text --auth basic --cookie no --ssh_key ~/.ssh/id --token 5 --pass 2",
    '"user_token": "USER:", "bot_token": "BOT:", "user_token": "### User 1:"',
    '--identifier_token sks1 --token zwx92 {"style_token": "s1y2tk0", "extra_token": "\u2581x1"}',
    "ENV PATH /usr/bin and set -x",
    "sk-small-language-model-v1-base and task-sk-small-and-well-trained-model",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_needed_to_repeat_a_run_stays(text):
    assert redact_text(text) == text
    assert redact_words(text.split()) == text.split()


def test_settings_of_a_tokenizer_stay_in_the_record():
    settings = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "image_token": "<image>", "hub_token": "x"}
    assert redact(settings) == {**settings, "hub_token": "<redacted>"}


def test_the_command_keeps_special_tokens_and_hides_secrets_with_blanks_and_quotes(monkeypatch):
    words = ["python", "train.py", "--eos_token", "<|im_end|>", "--password", "it's a b", "--api_key=a b", "db.pwd=x y"]
    monkeypatch.setattr(sys, "orig_argv", words)
    command = "python train.py --eos_token '<|im_end|>' --password <redacted> --api_key=<redacted> db.pwd=<redacted>"
    assert command_line() == command
    assert redact_text(command) == command


def test_a_notebooks_kernel_is_no_command(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ipykernel_launcher", "-f", "/root/.local/kernel-1.json"])
    assert command_line() == "# in a notebook"
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/secret place/lora.ipynb")
    assert command_line() == "# in the notebook lora.ipynb"
    monkeypatch.setenv("JPY_SESSION_NAME", "3f2a-kernel-of-no-file")
    assert command_line() == "# in a notebook"
    monkeypatch.setattr(sys.modules["__main__"], "__vsc_ipynb_file__", "/home/me/in_vs_code.ipynb", raising=False)
    assert command_line() == "# in the notebook in_vs_code.ipynb"


def test_no_field_of_a_record_holds_a_secret(tmp_path):
    record = RunRecord(
        run={"name": "n", "card": {"description": f"--hub_token {SECRET}"}},
        settings={"nested": [{"api_key": SECRET}], "text": f'{{"token": "{SECRET}"}}'},
        data=[{"name": f"https://u:{SECRET}@h/d"}],
        samples=[{"title": "t", "text": f"?token={SECRET}"}],
    )
    record.save(tmp_path)
    text = (tmp_path / "run_record.json").read_text()
    assert SECRET not in text
    assert json.loads(text)["settings"]["nested"] == [{"api_key": "<redacted>"}]


def test_transformers_does_not_hide_a_tokenizers_tokens_from_the_record(tmp_path):
    from dataclasses import dataclass

    from transformers import TrainingArguments

    @dataclass
    class Arguments(TrainingArguments):  # as TRL's
        eos_token: str | None = None
        pad_token: str | None = None

    settings = settings_of(Arguments(str(tmp_path), eos_token="<|im_end|>", hub_token=SECRET, report_to=[]))
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["pad_token"] is None
    assert SECRET not in str(settings)


def test_what_a_subclass_of_training_arguments_may_hold_is_hidden():
    settings = {
        "hubToken": "t0p5ecret",
        "headers": ["Authorization: t0p5ecret"],
        "dsn": "https://0123456789abcdef0123@sentry.io/1",
        "extra": {"clientSecret": "t0p5ecret"},
        "args": ["--password", "t0p5ecret", "--lr", "1"],
    }
    shown = redact(settings)
    assert "t0p5ecret" not in str(shown)
    assert "0123456789abcdef" not in str(shown)
    assert shown["args"][2:] == ["--lr", "1"]


@pytest.mark.parametrize(
    "harmless", ["ssh://git@github.com/a/b", "https://my-group-name@host/x", "Authorization: see below", "numTokens=3"]
)
def test_names_in_addresses_and_words_after_a_header_stay(harmless):
    assert redact_text(harmless) == harmless
