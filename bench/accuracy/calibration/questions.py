"""What models are asked, so that their own answers are text to measure with and to judge by."""

MEASURED = (
    "What is the difference between weather and climate?",
    "How do I make a simple vegetable soup?",
    "Explain what a database index is.",
    "Give me five tips for better sleep.",
    "Why is the sky blue?",
    "Write a short poem about autumn.",
    "How can I learn to play the guitar?",
    "What does a compiler do?",
    "Summarise the story of Romeo and Juliet.",
    "How do vaccines work?",
    "Write a Python function that reverses a string, and explain it.",
    "What should I pack for a week in the mountains?",
    "Explain inflation to a ten-year-old.",
    "What were the causes of the First World War?",
    "How do I write a good cover letter?",
    "What is the water cycle?",
    "Give me ideas for a birthday party at home.",
    "How does a bicycle stay upright?",
    "What is machine learning?",
    "Write an email that asks my landlord to repair the heating.",
    "How do plants make food?",
    "What is the best way to learn a new language?",
    "Explain how a bill becomes a law.",
    "What can I cook with rice, eggs and spinach?",
    "How do airplanes fly?",
    "What is recursion? Give an example.",
    "How should I prepare for a job interview?",
    "Tell me about the history of the Olympic Games.",
    "What is the difference between a virus and a bacterium?",
    "How do I start a small vegetable garden?",
    "Write a story about a lost dog, in three paragraphs.",
    "What is a healthy breakfast?",
    "How do I calculate compound interest?",
    "Explain the rules of chess.",
    "What makes a good leader?",
    "How can I save money every month?",
    "What is the capital of Australia, and what is it known for?",
    "How do I remove a coffee stain from a shirt?",
    "What is the purpose of unit tests?",
    "Describe a sunset at the sea.",
)
"""Answers to these are the text `chat` that statistics are measured with."""

JUDGED = {
    "first": (
        "How do I train for a five-kilometre run?",
        "What is a hash table, and when should I use one?",
        "Why do cats purr?",
        "Write a dialogue between two neighbours about noise.",
    ),
    "second": (
        "How do I take better photographs with my phone?",
        "Explain the difference between threads and processes.",
        "What causes earthquakes?",
        "Write a speech for a friend's wedding.",
    ),
}
"""Answers to these are judged, by half."""

LONG = {
    "first": "Write a long story about a lighthouse keeper who finds an old map, in many chapters.",
    "second": "Write a detailed guide to building a web application in Python, step by step.",
}
"""Each is answered at length."""
