import requests


def test_the_application_behind_the_mesh(app_port, hbone_pair):
    pair = hbone_pair(app_port)
    answer = requests.get(pair.url, timeout=60)
    assert answer.text == "hello\n"
