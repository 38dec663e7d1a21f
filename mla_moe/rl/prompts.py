def prompt_of(template, question, tokenizer):
    return [tokenizer.bos_id, *tokenizer.encode(template.replace("{question}", question)).tolist()]
