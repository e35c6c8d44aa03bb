"""What a model said in a folder of `kvote eval`, beside what was right.

python examples/show_answers.py FOLDER
"""

import json
import sys
from pathlib import Path

records = [json.loads(line) for line in (Path(sys.argv[1]) / "samples.jsonl").read_text().splitlines()]
for name in dict.fromkeys(record["name"] for record in records):
    asked = [record for record in records if record["name"] == name and record.get("answers")]
    scores = [score for record in asked for score in record["scores"]]
    print(f"\n{name}: {sum(score == 1 for score in scores)} of {len(scores)} right")
    for record in asked:
        print(f"  a text of {record['document_tokens']:,} tokens, of which a query read {record['tokens_read']:,}")
        for score, expected, answer in zip(record["scores"], record["expected"], record["answers"], strict=True):
            said = " ".join(answer.split())
            print(f"    {'right' if score == 1 else 'wrong'}  {', '.join(expected)}: {said}")
