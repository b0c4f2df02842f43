"""LitServe's API class, one worker per CPU: `python litserve_server.py PORT`. MODEL names the joblib file."""

import os
import sys

import joblib
import litserve
import pandas as pd


class Flights(litserve.LitAPI):  # annotated as its documentation does: it reads annotations
    def setup(self, device):
        self.model = joblib.load(os.environ["MODEL"])

    def decode_request(self, request):
        return pd.DataFrame(request["rows"])

    def predict(self, frame):
        return self.model.predict_proba(frame)[:, 1]

    def encode_response(self, output):
        return {"predictions": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Flights(), accelerator="cpu", workers_per_device=os.cpu_count() or 1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
